"""The sidebar's controls: thinking, length, sampling, format and tools of the next request; the page's language.

No control interrupts a running answer: its value is read with the next question.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from web.api_client.client import Info
from web.chat import json_answer
from web.chat.presets import OBJECTS_SCHEMA
from web.i18n.strings import LANGUAGES, Texts
from web.safe_text import escaped

MAX_TOKENS_CEILING = 32_768
NAMES = ("thinking", "max-tokens", "temperature", "top-p", "top-k", "penalty", "seed", "system", "json-on",
         "json-schema", "tools")  # fmt: skip


@dataclass(frozen=True)
class RequestOptions:
    """Options of the next request. `body`: the fields that differ from the API's defaults.

    `schema`: the JSON schema of the answer ({}: any JSON; None: free text). `problems`: sentences about options that
    cannot be sent.
    """

    thinking: bool
    system: str = ""
    schema: dict[str, Any] | None = None
    body: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def as_body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": self.thinking}, **self.body}
        if self.schema:
            json_schema = {"name": "answer", "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        elif self.schema is not None:
            body["response_format"] = {"type": "json_object"}
        return body


def key(name: str) -> str:
    """A widget's key. A reset changes every key, so that every widget starts with its default value."""
    version = st.session_state.get("options_version", 0)
    return f"{name}-{version}" if version else name


def keep_values() -> None:
    """Assign all values again: Streamlit drops the value of a widget that the current page does not draw."""
    for name in NAMES:
        if key(name) in st.session_state:
            st.session_state[key(name)] = st.session_state[key(name)]


def request_json(schema: dict[str, Any] | None) -> None:
    """Turn the JSON option on with this schema, or off with None. Only a callback may call it."""
    st.session_state[key("json-on")] = schema is not None
    if schema is not None:
        st.session_state[key("json-schema")] = json.dumps(schema, indent=2)


def show_request_options(info: Info | None, texts: Texts) -> RequestOptions:
    _set_default("thinking", True)
    thinking = st.toggle(
        texts("side.thinking"), help=texts("side.thinking_help"), key=key("thinking"), on_change="ignore"
    )
    if info is None:
        return RequestOptions(thinking)
    body: dict[str, Any] = {}
    problems: list[str] = []
    with st.expander(texts("side.settings"), icon=":material/tune:"):
        system = st.text_area(
            texts("side.system"), help=texts("side.system_help"), key=key("system"), on_change="ignore", height=80
        )
        body |= _length(info, texts, thinking)
        body |= _sampling(info.generation, texts)
        _reset_button(texts)
    with st.expander(texts("side.format"), icon=":material/data_object:"):
        schema = _format(texts, problems)
        if tools := _tools(texts, problems):
            body["tools"] = tools
    return RequestOptions(thinking, system.strip(), schema, body, tuple(problems))


@st.fragment
def show_language(texts: Texts) -> None:
    """A fragment, so that a click while an answer streams takes effect afterwards instead of interrupting it."""
    chosen = st.segmented_control(
        texts("side.language"),
        list(LANGUAGES),
        format_func=lambda language: LANGUAGES[language],
        default=texts.language,
        required=True,
        key="language-choice",
    )
    if chosen and chosen != st.session_state["language"]:
        st.session_state["language"] = chosen
        st.query_params["lang"] = chosen
        st.rerun()


def _set_default(name: str, value: object) -> None:
    st.session_state.setdefault(key(name), value)


def _length(info: Info, texts: Texts, thinking: bool) -> dict[str, Any]:
    """The longest answer, if it is not the server's own, which leaves room after a thought."""
    ceiling = min(info.context_tokens or MAX_TOKENS_CEILING, MAX_TOKENS_CEILING)
    plain = min(info.limits.get("default_max_tokens", 1024), ceiling)
    defaults = {plain, min(info.limits.get("default_max_tokens_thinking", plain), ceiling)}
    _set_default("max-tokens", max(defaults) if thinking else plain)
    max_tokens = st.number_input(
        texts("side.max_tokens"), min_value=1, max_value=max(ceiling, 1), step=64, help=texts("side.max_tokens_help"),
        key=key("max-tokens"), on_change="ignore",
    )  # fmt: skip
    return {} if max_tokens in defaults else {"max_tokens": int(max_tokens)}


def _sampling(generation: dict[str, Any], texts: Texts) -> dict[str, Any]:
    """The sampling parameters that differ from the model's generation config."""
    defaults = {"temperature": default_temperature(generation), "top_p": _number(generation, "top_p", 1.0),
             "top_k": int(_number(generation, "top_k", 0)),
             "repetition_penalty": _number(generation, "repetition_penalty", 1.0)}  # fmt: skip
    for widget, parameter in (("temperature", "temperature"), ("top-p", "top_p"), ("top-k", "top_k"), ("penalty", "repetition_penalty")):
        _set_default(widget, defaults[parameter])
    values = {
        "temperature": st.slider(
            texts("side.temperature"), 0.0, 2.0, step=0.05, help=texts("side.temperature_help"),
            key=key("temperature"), on_change="ignore",
        ),
        "top_p": st.slider(
            texts("side.top_p"), 0.0, 1.0, step=0.01, help=texts("side.top_p_help"), key=key("top-p"),
            on_change="ignore",
        ),
        "top_k": st.number_input(
            texts("side.top_k"), 0, 1000, step=1, help=texts("side.top_k_help"), key=key("top-k"), on_change="ignore"
        ),
        "repetition_penalty": st.slider(
            texts("side.penalty"), 0.5, 2.0, step=0.05, help=texts("side.penalty_help"), key=key("penalty"),
            on_change="ignore",
        ),
    }  # fmt: skip
    _set_default("seed", None)
    seed = st.number_input(
        texts("side.seed"), min_value=0, max_value=2**53 - 1, step=1, help=texts("side.seed_help"), key=key("seed"),
        placeholder=texts("side.seed_none"), on_change="ignore",
    )  # fmt: skip
    body = {name: value for name, value in values.items() if abs(value - defaults[name]) > 1e-6}
    return body if seed is None else {**body, "seed": int(seed)}


def _format(texts: Texts, problems: list[str]) -> dict[str, Any] | None:
    """The JSON schema of the answer; {} for any JSON, None for free text."""
    _set_default("json-schema", json.dumps(OBJECTS_SCHEMA, indent=2))
    on = st.toggle(texts("side.json"), help=texts("side.json_help"), key=key("json-on"), on_change="ignore")
    text = st.text_area(texts("side.schema"), key=key("json-schema"), height=160, on_change="ignore")
    if not on:
        return None
    if not text.strip():
        return {}
    try:
        return json_answer.parse_schema(text)
    except ValueError as error:
        problems.append(texts("side.schema_wrong", why=escaped(str(error))))
        return None


def _tools(texts: Texts, problems: list[str]) -> list[dict[str, Any]]:
    text = st.text_area(
        texts("side.tools"), key=key("tools"), height=100, help=texts("side.tools_help"), on_change="ignore"
    )
    if not text.strip():
        return []
    try:
        return json_answer.parse_tools(text)
    except ValueError as error:
        problems.append(texts("side.tools_wrong", why=escaped(str(error))))
        return []


@st.fragment
def _reset_button(texts: Texts) -> None:
    if st.button(texts("side.reset"), icon=":material/restart_alt:", width="stretch", key="reset"):
        st.session_state["options_version"] = st.session_state.get("options_version", 0) + 1
        st.rerun()


def default_temperature(generation: dict[str, Any]) -> float:
    """The temperature of the model's generation config; 0 if it does not sample."""
    if generation.get("do_sample") is False:
        return 0.0
    return min(2.0, max(0.0, _number(generation, "temperature", 1.0)))


def _number(generation: dict[str, Any], name: str, default: float) -> float:
    value = generation.get(name)
    return float(value) if isinstance(value, int | float) else default
