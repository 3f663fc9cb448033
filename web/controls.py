"""The sidebar: new chat, thinking, the length and variety of answers, the language.

Every control but "new chat" leaves a running answer alone: its value is read with the next question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st

from web.client import Info
from web.strings import LANGUAGES, Words

MAX_TOKENS_CEILING = 32_768


@dataclass(frozen=True)
class Wishes:
    """How the next answer is wanted. None: as the API does by itself."""

    thinking: bool
    max_tokens: int | None = None
    temperature: float | None = None

    def as_body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": self.thinking}}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body


def sidebar(info: Info | None, words: Words, new_chat: Callable[[], None]) -> Wishes:
    with st.sidebar:
        st.button(words("side.new"), icon=":material/edit_square:", width="stretch", on_click=new_chat, key="new-chat")
        st.space("small")
        thinking = st.toggle(
            words("side.thinking"), value=True, help=words("side.thinking_help"), key="thinking", on_change="ignore"
        )
        wishes = _settings(thinking, info, words) if info else Wishes(thinking)
        st.space("small")
        _language(words)
    return wishes


def _settings(thinking: bool, info: Info, words: Words) -> Wishes:
    ceiling = min(info.context_tokens or MAX_TOKENS_CEILING, MAX_TOKENS_CEILING)
    longest = min(info.limits.get("default_max_tokens", 1024), ceiling)
    usual = usual_temperature(info.generation)
    with st.expander(words("side.settings"), icon=":material/tune:"):
        max_tokens = st.number_input(
            words("side.max_tokens"),
            min_value=1,
            max_value=ceiling,
            value=longest,
            step=64,
            help=words("side.max_tokens_help"),
            key="max-tokens",
            on_change="ignore",
        )
        temperature = st.slider(
            words("side.temperature"),
            min_value=0.0,
            max_value=2.0,
            value=usual,
            step=0.05,
            help=words("side.temperature_help"),
            key="temperature",
            on_change="ignore",
        )
    # An untouched slider sends nothing: the API then uses the model's own sampling, not only its temperature.
    return Wishes(thinking, int(max_tokens), float(temperature) if temperature != usual else None)


def usual_temperature(generation: dict[str, Any]) -> float:
    """What the model's generation config amounts to."""
    if generation.get("do_sample") is False:
        return 0.0
    value = generation.get("temperature")
    return min(2.0, max(0.0, float(value))) if isinstance(value, int | float) else 1.0


@st.fragment
def _language(words: Words) -> None:
    """A fragment: a click while an answer comes takes effect when it has come, instead of cutting it off."""
    chosen = st.segmented_control(
        words("side.language"),
        list(LANGUAGES),
        format_func=lambda language: LANGUAGES[language],
        default=words.language,
        required=True,
        key="language-choice",
    )
    if chosen and chosen != st.session_state["language"]:
        st.session_state["language"] = chosen
        st.query_params["lang"] = chosen
        st.rerun()
