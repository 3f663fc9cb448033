"""Only whole characters are emitted, and stop strings are found however tokens split them."""

from __future__ import annotations

import random

import pytest

from api.engine.text.output import Detokenizer

THINK = ("<think>", "</think>")


def feed_all(detokenizer: Detokenizer, pieces: list[bytes]) -> list[str]:
    out = []
    for piece in pieces:
        out.append(detokenizer.feed(piece))
        if detokenizer.stopped:
            return out
    return [*out, detokenizer.finish()]


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.sample(range(len(data) + 1), rng.randrange(min(8, len(data)))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("text", ["plain", "中文和 emoji 👩‍🔬 mixed", "é" * 9])
def test_single_bytes_make_whole_characters(text: str) -> None:
    pieces = feed_all(Detokenizer(), [bytes([byte]) for byte in text.encode()])

    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_is_replaced_at_the_end() -> None:
    detokenizer = Detokenizer()

    assert detokenizer.feed("语".encode()[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_invalid_bytes_do_not_hold_back_what_follows() -> None:
    assert Detokenizer().feed(b"\xff\xfe ok") == "\ufffd\ufffd ok"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "wo"), "one t"),
        ("abc", ("abc", "b"), "a"),
        ("aab", ("ab",), "a"),
        ("never", ("nope",), "never"),
        ("句子。然后", ("。",), "句子"),
        ("\nanswer\nmore", ("\n",), "\nanswer"),
        ("\n<think>a\nb</think>\nanswer\nmore", ("\n",), "\n<think>a\nb</think>\nanswer"),
        ("<think>END</think>x END y", ("END",), "<think>END</think>x "),
        ("<thing> END", ("END",), "<thing> "),
        ("ends like st", ("stop",), "ends like st"),
    ],
)
def test_a_stop_string_ends_the_text_however_it_is_cut(text: str, stop: tuple[str, ...], expected: str) -> None:
    data = text.encode()
    rng = random.Random(5)
    cuts = [[data], [bytes([byte]) for byte in data], *(cut(data, rng) for _ in range(60))]

    for pieces in cuts:
        detokenizer = Detokenizer(stop, THINK)
        assert "".join(feed_all(detokenizer, pieces)) == expected, pieces
        assert detokenizer.stopped == (expected != text)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    detokenizer = Detokenizer(("STOP",))

    assert detokenizer.feed(b"some text S") == "some text "
    assert detokenizer.feed(b"o on") == "So on"
