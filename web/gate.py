"""The door of the page: nobody passes without the token, if one is set."""

from __future__ import annotations

import hmac

import streamlit as st

from web.strings import Words


def is_right(given: str, token: str) -> bool:
    """Compared in constant time, so that the time taken tells nothing of how much was right."""
    return hmac.compare_digest(given.strip().encode(), token.encode())


def require_token(token: str, words: Words) -> None:
    """Returns if the visitor may pass; otherwise shows only a token box and ends the run."""
    if not token or st.session_state.get("admitted"):
        return
    given = st.query_params.get("token", "")
    if given and is_right(given, token):
        st.session_state["admitted"] = True
        return
    typed = _ask(words)
    if typed and is_right(typed, token):
        st.session_state["admitted"] = True
        st.query_params["token"] = typed.strip()  # as in the printed link, so that a reload passes too
        st.rerun()
    if typed or given:
        st.error(words("gate.wrong"), icon=":material/key_off:")
    st.stop()


def _ask(words: Words) -> str:
    st.header(words("gate.title"), anchor=False)
    st.markdown(words("gate.how"))
    with st.form("gate", border=False):
        typed = st.text_input(words("gate.token"), type="password", autocomplete="off")
        st.form_submit_button(words("gate.open"), type="primary", icon=":material/lock_open:")
    return typed
