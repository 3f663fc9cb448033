"""What Streamlit runs for each visitor and each click: language, gate, page."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

import settings as settings_module
from web import gate, page_chat
from web.client import ApiClient
from web.strings import LANGUAGES, Words, language_for

ICON = Path(__file__).resolve().parent / "icon.png"


def main() -> None:
    words = Words(_language())
    st.set_page_config(page_title=words("title"), page_icon=str(ICON), layout="centered")
    if "settings" not in st.session_state:
        st.session_state["settings"] = settings_module.load()
    settings = st.session_state["settings"]
    gate.require_token(settings.web_token.get_secret_value() if settings.web_token else "", words)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    page_chat.show(ApiClient(settings.api_base_url, key), settings, words)


def _language() -> str:
    """Chosen on the page or in the link (`?lang=zh`), else the browser's."""
    if "language" not in st.session_state:
        asked = st.query_params.get("lang", "")
        st.session_state["language"] = asked if asked in LANGUAGES else language_for(st.context.locale)
    return str(st.session_state["language"])


main()
