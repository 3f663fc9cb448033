"""The script that Streamlit runs for each visitor and each click: it chooses the language, the visitor and the page."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

import streamlit as st

import settings as settings_module
from settings import Settings
from web import access
from web.api_client.client import ApiClient
from web.chat import controls
from web.chat.page import show_chat
from web.console.page import show_console
from web.history.chat_store import FILE_NAME, ChatStore, StoreError, VisitorChats
from web.i18n.strings import LANGUAGES, Texts, language_for

log = logging.getLogger("web")

CONSOLE_HEADER = "X-GLM-Console"
ICON = Path(__file__).resolve().parent / "icon.png"


def main() -> None:
    texts = Texts(_language())
    st.set_page_config(page_icon=str(ICON), layout="centered")
    if "settings" not in st.session_state:
        st.session_state["settings"] = settings_module.kept()
    settings: Settings = st.session_state["settings"]
    controls.keep_values()
    client = ApiClient.of(settings)
    chats = VisitorChats(_store(settings.log_dir / FILE_NAME, settings.chat_days), _visitor(settings))

    closed = _console_is_closed()

    def chat() -> None:
        show_chat(client, settings, texts, chats, None if closed else console_page)

    def console() -> None:
        st.set_page_config(layout="wide")
        with st.sidebar:
            controls.show_language(texts)
        show_console(client, settings, texts)

    chat_page = st.Page(chat, title=texts("nav.chat"), icon=":material/forum:", default=True)
    console_page = st.Page(console, title=texts("nav.console"), icon=":material/monitor_heart:", url_path="console")
    if closed:
        st.navigation([chat_page], position="hidden").run()
    else:
        st.navigation([chat_page, console_page], position="top").run()


def _console_is_closed() -> bool:
    """The proxy says so to visitors from outside, on each request and on the WebSocket; they can only add headers."""
    return any(value == "closed" for value in st.context.headers.get_all(CONSOLE_HEADER))


def _language() -> str:
    """Chosen on the page or in the link (`?lang=zh`), else the browser's."""
    if "language" not in st.session_state:
        requested = st.query_params.get("lang", "")
        st.session_state["language"] = requested if requested in LANGUAGES else language_for(st.context.locale)
    return str(st.session_state["language"])


def _visitor(settings: Settings) -> str:
    """The id in the signed cookie; without a cookie, an id for this session only."""
    token = settings.web_token.get_secret_value() if settings.web_token else ""
    signed = access.VisitorCookies(token).visitor_of(str(st.context.cookies.get(access.COOKIE, "")))
    if signed is not None:
        return signed
    return str(st.session_state.setdefault("visitor", secrets.token_urlsafe(16)))


@st.cache_resource(show_spinner=False)
def _store(path: Path, keep_days: int) -> ChatStore | None:
    """None if the file cannot be created; the page then says that chats are not saved."""
    try:
        return ChatStore(path, keep_days)
    except StoreError as error:
        log.error("event=chats_not_kept reason=%r", str(error))
        return None


main()
