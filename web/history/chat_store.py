"""The store of chats: one SQLite file for all visitors, and `VisitorChats`, one visitor's access to it.

Owns the tables, the bytes of the images (stored once, by hash) and their deletion. Knows nothing of Streamlit. Every
query names the visitor as well as the chat, so that a copied URL shows nothing to others. Every change is one
transaction.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from monitor.store import steady_time
from monitor.store.salvage import is_damage, salvage, set_aside
from web.history.conversation import Conversation, Turn
from web.images.attached_image import AttachedImage, data_url

FILE_NAME = "chats.db"
LIST_LENGTH = 100
DAY_S = 86400
BUSY_S = 5.0
SALVAGE_S = 60.0
SAVE_EVERY_S = 1.0  # while an answer streams; a killed process loses at most this much of it
# Columns and tables that are only added keep it, and an older program leaves them alone. A change that an older program must not
# meet raises it: that program keeps no chats then, says so, and leaves the file as it is.
VERSION = 1

TABLES = """
CREATE TABLE IF NOT EXISTS chats (
    id TEXT PRIMARY KEY, visitor TEXT NOT NULL, title TEXT NOT NULL, updated REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS chats_of_a_visitor ON chats (visitor, updated DESC);
CREATE TABLE IF NOT EXISTS turns (
    chat TEXT NOT NULL REFERENCES chats (id) ON DELETE CASCADE, number INTEGER NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (chat, number)
);
CREATE TABLE IF NOT EXISTS chat_pictures (
    chat TEXT NOT NULL REFERENCES chats (id) ON DELETE CASCADE, sha TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (chat, sha)
);
CREATE INDEX IF NOT EXISTS chats_of_a_picture ON chat_pictures (sha);
CREATE TABLE IF NOT EXISTS picture_bytes (sha TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

T = TypeVar("T")

log = logging.getLogger("web")

_TURN = TypeAdapter(Turn)
_IMAGE = TypeAdapter(AttachedImage)


class StoreError(Exception):
    """The chat could not be saved or read: a full disk, missing permissions, a damaged file."""


class StoreReplacedError(StoreError):
    """The file was damaged and is replaced by a new one with what could be read; the call may be repeated."""


class ChatChangedError(Exception):
    """Another tab has changed the turn that was to be saved. Nothing was written."""


@dataclass(frozen=True)
class ChatSummary:
    """One line of the list of chats. `updated`: Unix time in seconds."""

    id: str
    title: str
    updated: float


class ChatStore:
    """Safe for several threads and processes: every call opens its own connection. Every call may raise StoreError."""

    def __init__(self, path: Path, keep_days: int) -> None:
        """Creates the file and deletes old chats."""
        self._path = path
        self._keep_days = keep_days
        self._replacing = threading.Lock()
        self.replaced_at: float | None = None  # CLOCK_MONOTONIC
        try:
            self._create()
        except StoreReplacedError:
            self._create()
        self.delete_old(time.time())

    def _create(self) -> None:
        path = self._path
        if path.is_dir():
            with _as_store_error():
                set_aside(path, time.time())
        with _as_store_error():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Created before SQLite opens it, so that only this user can read it and its journal.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with self._connection() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(TABLES)
            db.execute(f"PRAGMA user_version = {VERSION}")

    def summaries(self, visitor: str) -> list[ChatSummary]:
        """The visitor's chats, most recently used first."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT id, title, updated FROM chats WHERE visitor = ? ORDER BY updated DESC LIMIT ?",
                (visitor, LIST_LENGTH),
            ).fetchall()
        return [ChatSummary(*row) for row in rows]

    def load(self, visitor: str, chat: str) -> Conversation | None:
        """None if the visitor has no such chat."""
        with self._connection() as db:
            row = db.execute("SELECT title FROM chats WHERE id = ? AND visitor = ?", (chat, visitor)).fetchone()
            if row is None:
                return None
            turns = db.execute("SELECT number, body FROM turns WHERE chat = ? ORDER BY number", (chat,)).fetchall()
            images = db.execute("SELECT body FROM chat_pictures WHERE chat = ?", (chat,)).fetchall()
        try:
            parsed_images = [_IMAGE.validate_json(body) for (body,) in images]
            parsed_turns = [_TURN.validate_json(body) for _, body in turns]
        except ValidationError as error:
            raise StoreError(f"{len(error.errors())} fields of the chat cannot be read") from None
        stored = {number: _digest(body) for number, body in turns}
        return Conversation(chat, row[0], parsed_turns, {image.sha: image for image in parsed_images}, stored)

    def save(self, visitor: str, conversation: Conversation, number: int | None = None) -> None:
        """Save one turn (the last by default) with its new images; the conversation then drops their bytes.

        Raises ChatChangedError, and StoreError also for a chat of another visitor.
        """
        number = len(conversation.turns) - 1 if number is None else number
        turn = conversation.turns[number]
        images = {sha: conversation.images[sha] for sha in turn.images}
        body = _TURN.dump_json(turn, by_alias=True).decode()
        before = conversation.stored.get(number)
        try:
            with self._connection() as db:
                self._save(db, visitor, conversation, number, body, images)
                # Before the transaction ends: the next run of the same session may wait for its own.
                conversation.stored[number] = _digest(body)
        except StoreError:
            conversation.stored.update({number: before} if before else {})
            raise
        conversation.drop_bytes(set(images))

    def _save(
        self, db: sqlite3.Connection, visitor: str, conversation: Conversation, number: int, body: str, images: dict[str, AttachedImage]
    ) -> None:
        # The first statement writes, so that nobody else does until the transaction ends.
        db.execute(
            "INSERT INTO chats (id, visitor, title, updated) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET updated = excluded.updated WHERE visitor = excluded.visitor",
            (conversation.id, visitor, conversation.title, time.time()),
        )
        if db.execute("SELECT visitor FROM chats WHERE id = ?", (conversation.id,)).fetchone() != (visitor,):
            raise StoreError("the chat belongs to another visitor")
        row = db.execute("SELECT body FROM turns WHERE chat = ? AND number = ?", (conversation.id, number)).fetchone()
        if row is not None and _digest(row[0]) != conversation.stored.get(number):
            raise ChatChangedError
        db.execute("INSERT OR REPLACE INTO turns (chat, number, body) VALUES (?, ?, ?)", (conversation.id, number, body))
        for sha, image in images.items():
            described = _IMAGE.dump_json(image.without_bytes()).decode()
            db.execute(
                "INSERT OR IGNORE INTO chat_pictures (chat, sha, body) VALUES (?, ?, ?)", (conversation.id, sha, described)
            )
            if image.data:
                db.execute("INSERT OR IGNORE INTO picture_bytes (sha, data) VALUES (?, ?)", (sha, image.data))

    def rename(self, visitor: str, chat: str, title: str) -> None:
        with self._connection() as db:
            db.execute("UPDATE chats SET title = ? WHERE id = ? AND visitor = ?", (title, chat, visitor))

    def delete(self, visitor: str, chat: str) -> None:
        with self._connection() as db:
            db.execute("DELETE FROM chats WHERE id = ? AND visitor = ?", (chat, visitor))
            _drop_unused_images(db)

    def image_bytes(self, image: AttachedImage) -> bytes:
        """Raises StoreError if they are missing."""
        if image.data:
            return image.data
        with self._connection() as db:
            row = db.execute("SELECT data FROM picture_bytes WHERE sha = ?", (image.sha,)).fetchone()
        if row is None:
            raise StoreError(f"the bytes of {image.name} are missing")
        return bytes(row[0])

    def delete_old(self, wall: float, monotonic: float | None = None) -> None:
        """Delete chats that were not used for `keep_days`. `wall`: Unix time in seconds, which alone deletes nothing."""
        with self._connection() as db:
            row = db.execute("SELECT value FROM facts WHERE name = 'steady_time'").fetchone()
            newest = db.execute("SELECT MAX(updated) FROM chats").fetchone()[0]
            record = json.loads(row[0]) if row else {"at": newest} if newest else {}
            steady = steady_time.advance(record, wall, monotonic)
            db.execute("INSERT OR REPLACE INTO facts VALUES ('steady_time', ?)", (json.dumps(steady),))
            now = steady["at"]
            deleted = db.execute("DELETE FROM chats WHERE updated < ?", (now - self._keep_days * DAY_S,)).rowcount
            if deleted:
                _drop_unused_images(db)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One transaction. Raises StoreError for any error of SQLite, StoreReplacedError for a damaged file."""
        with _as_store_error():
            opened = _identity(self._path)
            if self._path.is_dir():
                self._replace(opened, sqlite3.DatabaseError("a folder is in its place"))
            db = sqlite3.connect(self._path, timeout=BUSY_S)
            try:
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("PRAGMA synchronous = NORMAL")  # with WAL, safe against a killed process
                db.execute("PRAGMA secure_delete = ON")  # deleted images are overwritten with zeros
                version = int(db.execute("PRAGMA user_version").fetchone()[0])
                if version > VERSION:
                    raise StoreError(
                        f"{self._path} was written by a newer version (schema {version}; this one knows {VERSION}) and is left as it is: upgrade again, or move it away"
                    )
                with db:
                    yield db
            except sqlite3.Error as error:
                db.close()
                if not is_damage(error, self._path):
                    raise
                self._replace(opened, error)
            finally:
                db.close()

    def _replace(self, damaged: tuple[int, int], error: sqlite3.Error) -> None:
        """Sets the damaged file aside and salvages its rows into a new one. Raises StoreReplacedError, sqlite3.Error, OSError."""
        with self._replacing:
            if _identity(self._path) == damaged:  # else another thread has replaced it
                aside = set_aside(self._path, time.time())
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
                new = sqlite3.connect(self._path, timeout=BUSY_S)
                try:
                    new.execute("PRAGMA journal_mode = WAL")
                    new.executescript(TABLES)
                    rows = salvage(aside, new, SALVAGE_S)
                    for table in ("turns", "chat_pictures"):
                        new.execute(f"DELETE FROM {table} WHERE chat NOT IN (SELECT id FROM chats)")
                    new.execute(f"PRAGMA user_version = {VERSION}")
                    new.commit()
                finally:
                    new.close()
                self.replaced_at = time.monotonic()
                log.error("event=chats_salvaged reason=%r aside=%s rows=%s", str(error), aside.name, rows)
        raise StoreReplacedError(str(error))


class VisitorChats:
    """One visitor's chats. Store errors are logged and shown but never raised: a full disk must not break an answer.

    `failed`: the last access failed, or there is no store.
    """

    def __init__(self, store: ChatStore | None, visitor: str) -> None:
        self._store = store
        self._visitor = visitor
        self._saved_at = 0.0
        self.failed = store is None

    @property
    def replaced(self) -> bool:
        """A damaged file was replaced within the last day; some chats may be missing."""
        at = self._store.replaced_at if self._store else None
        return at is not None and time.monotonic() - at < DAY_S

    def summaries(self) -> list[ChatSummary]:
        return self._try(lambda store: store.summaries(self._visitor)) or []

    def load(self, chat: str) -> Conversation | None:
        return self._try(lambda store: store.load(self._visitor, chat))

    def save(self, conversation: Conversation) -> bool:
        """False if another tab has changed the last turn meanwhile, or added one; then nothing was saved."""
        self._saved_at = time.monotonic()
        try:
            self._try(lambda store: store.save(self._visitor, conversation))
        except ChatChangedError:
            return False
        return True

    def save_beside(self, conversation: Conversation) -> Conversation:
        """Saves the last turn behind those that another tab has added. The chat as it is then."""
        for _ in range(5):  # the other tab may go on
            newest = self.load(conversation.id)
            if newest is None:
                break
            newest.adopt(conversation.turns[-1], conversation.images)
            if self.save(newest):
                return newest
        return conversation

    def leave_out_older_images(self, conversation: Conversation) -> None:
        """Send only the images of the newest question from now on; the older ones stay visible."""
        for number in conversation.turns_with_older_images():
            conversation.turns[number].left_out = True
            with suppress(ChatChangedError):  # the next question says so
                self._try(lambda store, number=number: store.save(self._visitor, conversation, number))  # type: ignore[misc]

    def save_periodically(self, conversation: Conversation) -> None:
        """Save if SAVE_EVERY_S have passed since the last time."""
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save(conversation)

    def rename(self, conversation: Conversation, title: str) -> None:
        conversation.title = title
        self._try(lambda store: store.rename(self._visitor, conversation.id, title))

    def delete(self, chat: str) -> None:
        self._try(lambda store: store.delete(self._visitor, chat))

    def bytes_of(self, image: AttachedImage) -> bytes | None:
        """None for a remote image, or if the bytes are missing."""
        if image.data or image.url:
            return image.data or None
        return self._try(lambda store: store.image_bytes(image))

    def url_of(self, image: AttachedImage) -> str:
        """The URL to send. For missing bytes, an empty data URL, which the API rejects with a message."""
        return image.url or data_url(image.mime, self.bytes_of(image) or b"")

    def _try(self, access: Callable[[ChatStore], T]) -> T | None:
        if self._store is None:
            return None
        try:
            try:
                result = access(self._store)
            except StoreReplacedError:
                result = access(self._store)
        except StoreError as error:
            if not self.failed:
                log.warning("event=chat_not_kept reason=%r", str(error))
            self.failed = True
            return None
        self.failed = False
        return result


@contextmanager
def _as_store_error() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(str(error)) from None


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _drop_unused_images(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM picture_bytes WHERE sha NOT IN (SELECT sha FROM chat_pictures)")
