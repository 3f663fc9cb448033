"""Stores of an earlier version are read and go on; those of a later one are refused, and left as they are.

`older/` has what commit 189e1ba left behind after a picture question in the browser, three runs of the checker and a pause.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from monitor.store.state import CheckerState
from monitor.store.store import FILE_NAME, Store, fallback_path
from web.history.chat_store import ChatStore, StoreError

OLDER = Path(__file__).with_name("older")


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    shutil.copytree(OLDER, tmp_path / "logs")
    return tmp_path / "logs"


def test_the_history_of_an_earlier_version_goes_on(logs: Path) -> None:
    with closing(Store.open_for_run(logs)) as store:
        state = CheckerState.load(store, "")
        assert (store.state, store.damage) == ("ok", None)
        assert [row["word"] for row in store.runs(0)] == ["healthy"] * 3
        assert [row["kind"] for row in store.actions()] == ["pause"] and "pause" in state.holds
        assert state.last["runs"] == 3 and state.histories["api"].word == "healthy"
        with store.transaction():
            state.save(store)
            store.add_flip(time.time(), "api", "healthy", "busy", "r", "en", "zh")
    assert list(logs.glob("*.damaged-*")) == []
    _columns_are_those_of(OLDER / FILE_NAME, logs / FILE_NAME)


def test_the_chats_of_an_earlier_version_are_there(logs: Path) -> None:
    chats = ChatStore(logs / "chats.db", 36500)
    with closing(sqlite3.connect(logs / "chats.db")) as db:
        ((visitor, chat),) = db.execute("SELECT visitor, id FROM chats").fetchall()
    conversation = chats.load(visitor, chat)

    assert conversation is not None and conversation.turns[0].question == "Which color is the star?"
    assert conversation.turns[0].answer.state == "done"
    (image,) = conversation.images.values()
    assert chats.image_bytes(image).startswith(b"\x89PNG") or chats.image_bytes(image)
    conversation.ask("And the circle?", [])
    chats.save(visitor, conversation)
    _columns_are_those_of(OLDER / "chats.db", logs / "chats.db")


def _columns_are_those_of(older: Path, now: Path) -> None:
    """So the earlier version goes on with the file as well: it finds each of its tables and columns, and inserts rows by name."""
    for table, columns in _schema(older).items():
        missing = [name for name in columns if name not in _schema(now).get(table, ())]
        assert not missing, f"{table} no longer has {missing}: raise VERSION, and say in docs/upgrade.md what becomes of a rollback"
    with closing(sqlite3.connect(now)) as db, closing(sqlite3.connect(older)) as before:
        assert db.execute("PRAGMA user_version").fetchone() == before.execute("PRAGMA user_version").fetchone()


def _schema(path: Path) -> dict[str, list[str]]:
    with closing(sqlite3.connect(path)) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")]
        return {table: [row[1] for row in db.execute(f"PRAGMA table_info({table})")] for table in tables}


def _make_newer(path: Path, statement: str) -> bytes:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)
        db.execute("ALTER TABLE actions RENAME COLUMN detail TO details" if path.name == FILE_NAME else "ALTER TABLE turns RENAME COLUMN body TO text")
    return path.read_bytes()


def test_a_history_of_a_later_version_is_left_as_it_is_and_the_checker_goes_on(logs: Path) -> None:
    before = _make_newer(logs / FILE_NAME, "UPDATE state SET value = '2' WHERE name = 'version'")

    for number in (1, 2):  # what one run has written the next one knows: the number of restarts above all
        with closing(Store.open_for_run(logs)) as store:
            assert "written by a newer version (schema 2; this one knows 1)" in store.lost, store.lost
            assert store.get("counted", 0) == number - 1
            store.put("counted", number)
    with closing(Store.open(logs)) as asked:
        assert "newer version" in asked.lost

    assert (logs / FILE_NAME).read_bytes() == before
    assert list(logs.glob("*.damaged-*")) == [] and fallback_path(logs).exists()
    with closing(sqlite3.connect(logs / FILE_NAME)) as db, db:  # as after an upgrade: this is a program that knows the file
        db.execute("UPDATE state SET value = '1' WHERE name = 'version'")
        db.execute("ALTER TABLE actions RENAME COLUMN details TO detail")
    with closing(Store.open_for_run(logs)) as store:
        assert (store.lost, store.get("counted")) == ("", None) and len(store.actions()) == 1 and not fallback_path(logs).exists()



def test_chats_of_a_later_version_are_refused_and_left_as_they_are(logs: Path) -> None:
    before = _make_newer(logs / "chats.db", "PRAGMA user_version = 2")

    with pytest.raises(StoreError, match=r"newer version \(schema 2; this one knows 1\)"):
        ChatStore(logs / "chats.db", 90)

    assert (logs / "chats.db").read_bytes() == before
    assert list(logs.glob("*.damaged-*")) == []
