"""The top of the page: which model answers, what the demo knows, and why no answer would come now."""

from __future__ import annotations

import streamlit as st

from web.api_client.client import ApiClient, ApiError, Info
from web.chat.turns_view import show_error
from web.i18n.strings import Words
from web.safe_text import plain

MODEL_CHECK_S = 3  # how often a page whose model is not ready looks again


def show_heading(client: ApiClient, info: Info | None, trouble: ApiError | None, words: Words, at_start: bool) -> None:
    title, who, state = st.empty(), st.empty(), st.empty()
    if at_start:
        title.header(words("title"), anchor=False)
    ready = client.health().ready
    if info or ready:
        sentence, knows = _who_answers(info, words)
        gap = "" if words.language == "zh" else " "
        if at_start:
            who.markdown(f"{sentence}{gap}{knows}")
        else:
            who.caption(f"{sentence}{gap}{words('model.demo')}" if knows else sentence, help=knows or None)
    if trouble is not None and trouble.kind == "bad_key":
        with state.container():
            show_error(trouble, words)
    elif not ready:
        with state.container():
            _wait_for_model(client, words)


def _who_answers(info: Info | None, words: Words) -> tuple[str, str]:
    """Which model it is, and what it knows if it is the demo."""
    if info is None or not info.model:
        return words("model.unknown"), ""
    sentence = words("model.plain", model=plain(info.model.rstrip("/").rsplit("/", 1)[-1]))
    if not info.demo:
        return sentence, ""
    return sentence, info.knows.get(words.language) or info.knows.get("en") or words("model.demo")


@st.fragment(run_every=MODEL_CHECK_S)
def _wait_for_model(client: ApiClient, words: Words) -> None:
    """Tell why no answer would come now, until one would."""
    now = client.health()
    if now.ready:
        st.rerun()
    if now.state == "loading":
        if now.progress is None:
            st.info(words("model.loading_unknown"), icon=":material/hourglass_top:")
        else:
            percent = f"{100 * now.progress:.0f}"
            st.info(words("model.loading", percent=percent), icon=":material/hourglass_top:")
    else:
        key = "model.down" if now.state == "down" else "model.not_serving"
        st.warning(words(key), icon=":material/cloud_off:")
