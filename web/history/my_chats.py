"""One visitor's way to the store. What cannot be kept is noted and told, never raised into the page: a full disk
must not cost the answer that is on the screen. Knows nothing of Streamlit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from web.history.chat_store import ChatHead, ChatStore, StoreError
from web.history.conversation import Conversation
from web.images.pictures import Picture, data_url

SAVE_EVERY_S = 1.0  # while an answer comes; a killed process loses no more than this

T = TypeVar("T")

log = logging.getLogger("web")


class MyChats:
    """`failed` is True from the first change that could not be kept to the next one that could."""

    def __init__(self, store: ChatStore | None, visitor: str) -> None:
        self._store = store
        self._visitor = visitor
        self._saved_at = 0.0
        self.failed = store is None

    def heads(self) -> list[ChatHead]:
        return self._try(lambda store: store.heads(self._visitor)) or []

    def load(self, chat: str) -> Conversation | None:
        return self._try(lambda store: store.load(self._visitor, chat))

    def save(self, conversation: Conversation) -> None:
        self._saved_at = time.monotonic()
        self._try(lambda store: store.save(self._visitor, conversation))

    def leave_out_older_pictures(self, conversation: Conversation) -> None:
        """Stop sending all pictures but the newest question's; they stay where they are shown."""
        for number in conversation.with_older_pictures():
            conversation.turns[number].left_out = True
            self._try(lambda store, number=number: store.save(self._visitor, conversation, number))  # type: ignore[misc]

    def save_now_and_then(self, conversation: Conversation) -> None:
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save(conversation)

    def rename(self, conversation: Conversation, title: str) -> None:
        conversation.title = title
        self._try(lambda store: store.rename(self._visitor, conversation.id, title))

    def delete(self, chat: str) -> None:
        self._try(lambda store: store.delete(self._visitor, chat))

    def bytes_of(self, picture: Picture) -> bytes | None:
        """None for a picture that lies elsewhere or is lost."""
        if picture.data or picture.url:
            return picture.data or None
        return self._try(lambda store: store.picture_bytes(picture))

    def url_of(self, picture: Picture) -> str:
        """What to send. Bytes that are lost become an address that the API refuses with a sentence."""
        return picture.url or data_url(picture.mime, self.bytes_of(picture) or b"")

    def _try(self, act: Callable[[ChatStore], T]) -> T | None:
        if self._store is None:
            return None
        try:
            done = act(self._store)
        except StoreError as error:
            if not self.failed:
                log.warning("event=chat_not_kept reason=%r", str(error))
            self.failed = True
            return None
        self.failed = False
        return done
