"""Chats in SQLite: they are durable, belong to one visitor, and are deleted completely."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from page_process import ROOT

from web.api_client.answer_stream import BoundingBox, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from web.api_client.client import ApiError
from web.history.chat_store import DAY_S, FILE_NAME, ChatStore, StoreError, VisitorChats
from web.history.conversation import Conversation
from web.images.attached_image import AttachedImage, remote_image


@pytest.fixture
def store(tmp_path: Path) -> ChatStore:
    return ChatStore(tmp_path / FILE_NAME, keep_days=30)


def image(sha: str = "a") -> AttachedImage:
    return AttachedImage(sha, f"{sha}.png", "image/png", 8, 6, data=f"bytes of {sha}".encode())


def chat(question: str = "What is it?", *images: AttachedImage) -> Conversation:
    conversation = Conversation()
    turn = conversation.ask(question, list(images))
    for event in (ReasoningDelta("I look."), TextDelta("A circle."), BoundingBox((1, 2, 3, 4), 0, "circle", (1, 2, 3, 4)),
                  ToolCallDelta(0, "count", "{}"), Finished("stop", 7, request_id="r1")):  # fmt: skip
        turn.answer.apply(event, 5.0)
    return conversation


def rows(path: Path, table: str) -> int:
    with sqlite3.connect(path) as db:
        return int(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


def test_a_chat_is_loaded_as_it_was_saved(store: ChatStore) -> None:
    conversation = chat("What is it?", image(), remote_image("https://example.org/b.png"))
    conversation.turns[0].earlier.append(Conversation().ask("x", []).answer)
    conversation.turns[0].answer.fail(ApiError("lost", "gone", "r2"), 6.0)
    store.save("me", conversation)

    found = store.load("me", conversation.id)

    assert found == conversation
    assert found is not None
    assert store.image_bytes(found.images["a"]) == b"bytes of a"


def test_a_saved_chat_drops_the_bytes_of_its_images(store: ChatStore) -> None:
    conversation = chat("What is it?", image())

    store.save("me", conversation)

    assert conversation.images["a"].data == b""


def test_no_visitor_reads_renames_or_deletes_another_s_chat(store: ChatStore) -> None:
    conversation = chat("secret", image())
    store.save("me", conversation)

    store.rename("you", conversation.id, "stolen")
    store.delete("you", conversation.id)

    assert store.load("you", conversation.id) is None
    assert store.summaries("you") == []
    assert [head.title for head in store.summaries("me")] == ["secret"]


def test_no_visitor_writes_into_another_s_chat(store: ChatStore, tmp_path: Path) -> None:
    mine = chat("mine")
    store.save("me", mine)
    copied = Conversation(id=mine.id)
    copied.ask("yours", [image("b")])

    with pytest.raises(StoreError, match="another visitor"):
        store.save("you", copied)
    copied.ask("one more", [])
    with pytest.raises(StoreError, match="another visitor"):
        store.save("you", copied)

    assert store.load("me", mine.id) == mine
    assert (rows(tmp_path / FILE_NAME, "turns"), rows(tmp_path / FILE_NAME, "picture_bytes")) == (1, 0)


def test_two_tabs_on_one_chat_overwrite_nothing_of_each_other(store: ChatStore) -> None:
    chats = VisitorChats(store, "me")
    first = chat("The question of both")
    assert chats.save(first)
    second = chats.load(first.id)
    assert second is not None

    first.ask("From the first tab", [image("a")])
    assert chats.save(first)
    second.ask("From the second tab", [image("b")])

    assert not chats.save(second)
    assert not chats.failed
    merged = chats.save_beside(second)
    assert [turn.question for turn in merged.turns] == ["The question of both", "From the first tab", "From the second tab"]
    first.turns[-1].answer.apply(TextDelta("Written later."), 9.0)
    assert chats.save(first)  # an answer that still streams is not disturbed
    found = store.load("me", first.id)
    assert found is not None
    assert [turn.answer.text for turn in found.turns] == ["A circle.", "Written later.", ""]
    assert {store.image_bytes(each) for each in found.images.values()} == {b"bytes of a", b"bytes of b"}


def test_repeating_a_question_does_not_overwrite_what_another_tab_made_of_it(store: ChatStore) -> None:
    chats = VisitorChats(store, "me")
    first = chat()
    chats.save(first)
    second = chats.load(first.id)
    assert second is not None

    first.ask_again("What color?")
    assert chats.save(first)
    second.ask_again("What shape?")

    assert not chats.save(second)
    found = store.load("me", first.id)
    assert found is not None and found.turns[-1].question == "What color?"


def test_the_list_starts_with_the_chat_used_last(store: ChatStore) -> None:
    first, second = chat("first"), chat("second")
    for each in (first, second, first):
        store.save("me", each)

    assert [head.title for head in store.summaries("me")] == ["first", "second"]


def test_a_new_name_survives_the_next_question(store: ChatStore) -> None:
    conversation = chat("first")
    store.save("me", conversation)

    store.rename("me", conversation.id, "My name")
    conversation.ask("second", [])
    store.save("me", conversation)

    assert store.summaries("me")[0].title == "My name"


def test_deleting_a_chat_deletes_its_images_but_not_shared_ones(store: ChatStore, tmp_path: Path) -> None:
    chats, yours = chat("mine", image("a"), image("b")), chat("yours", image("b"))
    store.save("me", chats)
    store.save("you", yours)

    store.delete("me", chats.id)

    assert rows(tmp_path / FILE_NAME, "turns") == 1
    assert store.image_bytes(image("b").without_bytes()) == b"bytes of b"
    with pytest.raises(StoreError):
        store.image_bytes(image("a").without_bytes())


def test_a_deleted_image_is_overwritten_in_the_file(store: ChatStore, tmp_path: Path) -> None:
    secret = b"a secret that must go" * 1000
    conversation = chat("mine", AttachedImage("s", "s.png", "image/png", 8, 8, data=secret))
    store.save("me", conversation)

    store.delete("me", conversation.id)
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    assert b"a secret that must go" not in (tmp_path / FILE_NAME).read_bytes()


def test_unused_chats_are_deleted_after_the_retention_time(store: ChatStore, tmp_path: Path) -> None:
    store.save("me", chat("old", image()))

    running_s = time.monotonic()
    store.delete_old(time.time() + 29 * DAY_S, running_s + 29 * DAY_S)
    assert len(store.summaries("me")) == 1
    store.delete_old(time.time() + 31 * DAY_S, running_s + 31 * DAY_S)

    assert store.summaries("me") == []
    assert rows(tmp_path / FILE_NAME, "picture_bytes") == 0


def test_a_clock_that_jumps_deletes_no_chat(store: ChatStore) -> None:
    store.save("me", chat("old"))

    for jump in (31 * DAY_S, 3650 * DAY_S, -3650 * DAY_S, 3650 * DAY_S):
        store.delete_old(time.time() + jump)

    assert len(store.summaries("me")) == 1


@pytest.mark.parametrize("way", ["middle", "zeros", "end", "folder"])
def test_a_damaged_file_is_set_aside_and_what_can_be_read_is_kept(store: ChatStore, tmp_path: Path, way: str) -> None:
    chats = [chat(f"question {number} " + "long " * 400, image(str(number))) for number in range(40)]
    for each in chats:
        store.save("me", each)
    path = tmp_path / FILE_NAME
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    if way == "folder":
        path.unlink()
        path.mkdir()
    else:
        with path.open("r+b") as file:
            file.seek({"middle": size // 2 // 4096 * 4096, "zeros": 0, "end": 0}[way])
            file.write({"middle": bytes(3 * 4096), "zeros": bytes(size), "end": b""}[way])
            file.truncate(size // 2 if way == "end" else size)
    mine = VisitorChats(store, "me")

    found = [mine.load(each.id) for each in chats]
    mine.save(chats[0])

    kept = sum(each is not None for each in found)
    assert not mine.failed and mine.replaced
    assert len(list(tmp_path.glob(f"{FILE_NAME}.damaged-*"))) >= 1
    assert mine.load(chats[0].id) is not None, "saved into the new file"
    assert path.stat().st_mode & 0o077 == 0
    if way in ("middle", "end"):
        assert kept > 10


def test_only_the_owner_may_read_the_file(store: ChatStore, tmp_path: Path) -> None:
    store.save("me", chat())

    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.glob(f"{FILE_NAME}*")} == {"0o600"}


def test_a_killed_process_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from web.history.chat_store import ChatStore;"
        "from web.history.conversation import Conversation; c = Conversation('an-id'); c.ask('kept?', []);"
        "ChatStore(Path(sys.argv[1]), 30).save('me', c); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / FILE_NAME)], cwd=ROOT, timeout=120)

    found = ChatStore(tmp_path / FILE_NAME, 30).load("me", "an-id")

    assert done.returncode == -9
    assert found is not None
    assert found.turns[0].question == "kept?"


def test_a_damaged_row_raises_a_store_error(store: ChatStore, tmp_path: Path) -> None:
    conversation = chat()
    store.save("me", conversation)
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("UPDATE turns SET body = '{\"question\": 7}'")

    with pytest.raises(StoreError, match="cannot be read"):
        store.load("me", conversation.id)


def test_a_damaged_store_does_not_lose_the_open_chat(tmp_path: Path) -> None:
    store = ChatStore(tmp_path / FILE_NAME, 30)
    chats, conversation = VisitorChats(store, "me"), chat("What is it?", image())
    os.truncate(tmp_path / FILE_NAME, 0)
    (tmp_path / FILE_NAME).write_bytes(b"no database at all, but rubbish" * 100)

    chats.save(conversation)

    assert not chats.failed and chats.replaced
    assert chats.bytes_of(conversation.images["a"].without_bytes()) == b"bytes of a"
    assert len(chats.summaries()) == 1


def test_a_folder_that_cannot_be_created_raises_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError):
        ChatStore(tmp_path / "file" / FILE_NAME, 30)


TURN_AS_STORED = (
    '{"question":"Where?","pictures":["aa"],"sample":"shapes.png","answer":{"state":"done","question":"","text":"Here",'
    '"reasoning":"I look.","boxes":[{"corners":[1.0,2.0,3.0,4.0],"image":0,"label":"star","pixels":[5,6,7,8]}],'
    '"no_places":1,"calls":[{"name":"count","arguments":"{}","id":"call-7"}],"sent":["aa"],"schema":{},'
    '"queue_position":null,"loading":false,"loading_progress":null,"begun":5.0,"thinking_began":1.0,"thinking_s":1.0,'
    '"finish":{"reason":"stop","completion_tokens":7,"prompt_tokens":90,"ttft_s":0.25,"tokens_per_s":null,'
    '"cached_tokens":null,"request_id":"r"},"error":null},"earlier":[],"results":[],"left_out":true,'
    '"asked_at":1700000000.5}'
)
IMAGE_AS_STORED = '{"sha":"aa","name":"a.png","mime":"image/png","width":4,"height":3,"url":"","data":""}'


def test_the_stored_format_of_a_chat_does_not_change(store: ChatStore, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("INSERT INTO chats (id, visitor, title, updated) VALUES ('old', 'me', 'Where?', ?)", (time.time(),))
        db.execute("INSERT INTO turns (chat, number, body) VALUES ('old', 0, ?)", (TURN_AS_STORED,))
        db.execute("INSERT INTO chat_pictures (chat, sha, body) VALUES ('old', 'aa', ?)", (IMAGE_AS_STORED,))

    conversation = store.load("me", "old")

    assert conversation is not None
    (turn,) = conversation.turns
    assert turn.images == ("aa",)
    assert conversation.images["aa"].name == "a.png"
    assert (turn.answer.text, turn.answer.invalid_boxes, turn.answer.boxes[0].label) == ("Here", 1, "star")
    store.save("me", conversation)
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        ((saved,),) = db.execute("SELECT body FROM turns WHERE chat = 'old'").fetchall()
        ((image,),) = db.execute("SELECT body FROM chat_pictures WHERE chat = 'old'").fetchall()
    assert (saved, image) == (TURN_AS_STORED, IMAGE_AS_STORED)
