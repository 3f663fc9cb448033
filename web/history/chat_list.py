"""The sidebar's chats: start one, open one, rename, keep or delete the open one."""

from __future__ import annotations

import re
from collections.abc import Callable

import streamlit as st

from web.history import chat_export
from web.history.chat_store import MyChats
from web.history.conversation import Conversation
from web.i18n.strings import Words
from web.safe_text import plain

SHOWN = 12  # of the list, before "more"


def show_chats(
    mine: MyChats, conversation: Conversation, words: Words, open_chat: Callable[[str], None], new_chat: Callable[[], None]
) -> None:
    st.button(words("side.new"), icon=":material/edit_square:", width="stretch", on_click=new_chat, key="new-chat")
    heads = mine.heads()
    if not heads:
        return
    st.caption(words("side.chats"))
    with st.container(key="chats", gap="xxsmall"):
        _show_heads([(head.id, head.title) for head in heads[:SHOWN]], conversation.id, open_chat)
        if len(heads) > SHOWN:
            with st.expander(words("side.more", count=len(heads) - SHOWN), type="compact"):
                _show_heads([(head.id, head.title) for head in heads[SHOWN:]], conversation.id, open_chat)


def _show_heads(heads: list[tuple[str, str]], current: str, open_chat: Callable[[str], None]) -> None:
    for id, title in heads:
        st.button(
            plain(title),
            key=f"chat-{id}",
            type="secondary" if id == current else "tertiary",
            width="stretch",
            on_click=open_chat,
            args=(id,),
        )


def show_chat_menu(mine: MyChats, conversation: Conversation, words: Words, new_chat: Callable[[], None]) -> None:
    """What can be done with the open chat."""

    def rename() -> None:
        if title := str(st.session_state["chat-title"]).strip():
            mine.rename(conversation, title)

    def delete() -> None:
        mine.delete(conversation.id)
        new_chat()

    with st.popover(words("chat.menu"), icon=":material/more_horiz:", width="stretch"):
        st.session_state["chat-title"] = conversation.title
        st.text_input(words("chat.title"), key="chat-title", max_chars=120, on_change=rename)
        name = _file_name(conversation.title)
        st.download_button(
            words("chat.markdown"),
            lambda: chat_export.to_markdown(conversation, mine.url_of, words),
            f"{name}.md",
            "text/markdown",
            on_click="ignore",
            icon=":material/download:",
            width="stretch",
        )
        st.download_button(
            words("chat.json"),
            lambda: chat_export.to_json(conversation, mine.url_of),
            f"{name}.json",
            "application/json",
            on_click="ignore",
            icon=":material/download:",
            width="stretch",
        )
        if st.toggle(words("chat.delete"), key=f"delete-{conversation.id}"):
            st.button(
                words("chat.delete_sure"), icon=":material/delete:", type="primary", width="stretch", on_click=delete,
                key="delete-sure",
            )  # fmt: skip


def _file_name(title: str) -> str:
    return re.sub(r"[^\w-]+", "-", title).strip("-")[:60] or "chat"
