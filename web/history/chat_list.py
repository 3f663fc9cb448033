"""The sidebar's list of chats: start or open a chat; rename, export or delete the open one."""

from __future__ import annotations

import re
from collections.abc import Callable

import streamlit as st

from web.history import chat_export
from web.history.chat_store import ChatSummary, VisitorChats
from web.history.conversation import Conversation
from web.i18n.strings import Texts
from web.safe_text import escaped

SHOWN = 12  # of the list, before "more"


def show_chats(
    chats: VisitorChats, conversation: Conversation, texts: Texts, open_chat: Callable[[str], None], new_chat: Callable[[], None]
) -> None:
    st.button(texts("side.new"), icon=":material/edit_square:", width="stretch", on_click=new_chat, key="new-chat")
    summaries = chats.summaries()
    if not summaries:
        return
    st.caption(texts("side.chats"))
    with st.container(key="chats", gap="xxsmall"):
        _show_summaries(summaries[:SHOWN], conversation.id, open_chat)
        if len(summaries) > SHOWN:
            with st.expander(texts("side.more", count=len(summaries) - SHOWN), type="compact"):
                _show_summaries(summaries[SHOWN:], conversation.id, open_chat)


def _show_summaries(summaries: list[ChatSummary], current: str, open_chat: Callable[[str], None]) -> None:
    for summary in summaries:
        st.button(
            escaped(summary.title),
            key=f"chat-{summary.id}",
            type="secondary" if summary.id == current else "tertiary",
            width="stretch",
            on_click=open_chat,
            args=(summary.id,),
        )


def show_chat_menu(chats: VisitorChats, conversation: Conversation, texts: Texts, new_chat: Callable[[], None]) -> None:
    """The menu of the open chat."""

    def rename() -> None:
        if title := str(st.session_state["chat-title"]).strip():
            chats.rename(conversation, title)

    def delete() -> None:
        chats.delete(conversation.id)
        new_chat()

    with st.popover(texts("chat.menu"), icon=":material/more_horiz:", width="stretch"):
        st.session_state["chat-title"] = conversation.title
        st.text_input(texts("chat.title"), key="chat-title", max_chars=120, on_change=rename)
        name = _file_name(conversation.title)
        st.download_button(
            texts("chat.markdown"),
            lambda: chat_export.to_markdown(conversation, chats.url_of, texts),
            f"{name}.md",
            "text/markdown",
            on_click="ignore",
            icon=":material/download:",
            width="stretch",
        )
        st.download_button(
            texts("chat.json"),
            lambda: chat_export.to_json(conversation, chats.url_of),
            f"{name}.json",
            "application/json",
            on_click="ignore",
            icon=":material/download:",
            width="stretch",
        )
        if st.toggle(texts("chat.delete"), key=f"delete-{conversation.id}"):
            st.button(
                texts("chat.delete_sure"), icon=":material/delete:", type="primary", width="stretch", on_click=delete,
                key="delete-sure",
            )  # fmt: skip


def _file_name(title: str) -> str:
    return re.sub(r"[^\w-]+", "-", title).strip("-")[:60] or "chat"
