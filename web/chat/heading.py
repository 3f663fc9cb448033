"""The top of the page: which model answers, what the demo model knows, or why the model is not available."""

from __future__ import annotations

import streamlit as st

from web.api_client.client import ApiClient, ApiError, Info
from web.chat.loading_notice import loading_notice
from web.chat.timed_fragment import repeat
from web.chat.turns_view import show_error
from web.i18n.strings import Texts
from web.safe_text import escaped

MODEL_CHECK_S = 3  # how often the page polls a model that is not ready


def show_heading(client: ApiClient, info: Info | None, info_error: ApiError | None, texts: Texts, at_start: bool) -> None:
    ready = client.health().ready
    bad_key = info_error is not None and info_error.kind == "bad_key"
    unavailable = not (ready or bad_key)
    title = st.empty()
    # A timed part without content would take a gap of its own.
    with st.container(gap="small" if unavailable or bad_key else None):
        model, status = st.empty(), st.container()
    if at_start:
        title.header(texts("title"), anchor=False)
    if info or ready:
        sentence, knows = _model_line(info, texts)
        gap = "" if texts.language == "zh" else " "
        if at_start:
            model.markdown(f"{sentence}{gap}{knows}")
        else:
            model.caption(f"{sentence}{gap}{texts('model.demo')}" if knows else sentence, help=knows or None)
    with status:
        if unavailable:
            repeat(MODEL_CHECK_S, lambda timed: _say_why_unavailable(client, texts))
        else:
            repeat(None)
        if info_error is not None and bad_key:
            show_error(info_error, texts)


def _model_line(info: Info | None, texts: Texts) -> tuple[str, str]:
    """(which model answers, what it knows if it is the demo)."""
    if info is None or not info.model:
        return texts("model.unknown"), ""
    sentence = texts("model.plain", model=escaped(info.model.rstrip("/").rsplit("/", 1)[-1]))
    if not info.demo:
        return sentence, ""
    return sentence, info.knows.get(texts.language) or info.knows.get("en") or texts("model.demo")


def _say_why_unavailable(client: ApiClient, texts: Texts) -> None:
    """Say why the model is not available; once it is, draw the page again."""
    health = client.health()
    if health.ready:
        st.rerun()
    if health.state == "loading":
        st.info(loading_notice(health, texts), icon=":material/hourglass_top:")
    else:
        key = "model.down" if health.state == "down" else "model.not_serving"
        st.warning(texts(key), icon=":material/cloud_off:")
