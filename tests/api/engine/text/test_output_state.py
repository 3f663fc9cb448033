"""Constraints on the next token, the thinking budget and the finish reason of one output."""

from __future__ import annotations

import pytest
from fake_model import END, byte_tokenizer

from api.engine.request import FinishReason, Request, SamplingParams
from api.engine.text.output import OutputState, smallest_period
from api.engine.text.tokenizer import Vocabulary

VOCABULARY = Vocabulary(byte_tokenizer())
ENDS = frozenset(VOCABULARY.special[name] for name in END)
CLOSE = tuple(VOCABULARY.encode("\n</think>"))


def answer(prompt: str = "q<|assistant|>", **sampling) -> OutputState:
    request = Request("r", tuple(VOCABULARY.encode(prompt)), SamplingParams(**{"max_tokens": 100, **sampling}))
    return OutputState(request, VOCABULARY, ENDS, context_tokens=1000)


def feed(one: OutputState, text: str) -> tuple[str, FinishReason | None]:
    """Feed the tokens of `text`, and forced tokens where there are any."""
    out, tokens = "", VOCABULARY.encode(text)
    while tokens or one.forced is not None:
        token = tokens.pop(0) if one.forced is None else one.forced
        piece, reason = one.feed(token)
        out += piece
        if reason:
            return out, reason
    return out, None


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|assistant|>", "<think>abcdef", "<think>abc\n</think>def"),
        ("<|assistant|>", "\n<think>abcdef", "\n<think>abc\n</think>def"),
        ("<|assistant|><think>", "abcdef", "abc\n</think>def"),
        ("<|assistant|><think>", "ab</think>cdef", "ab</think>cdef"),
        ("<|assistant|>\n<think></think>", "abcdef", "abcdef"),
        ("<|assistant|>", "abcdef<think>ghijkl", "abcdef<think>ghijkl"),
        ("<think></think>x<|user|>\n<|assistant|>", "<think>abcdef", "<think>abc\n</think>def"),
    ],
)
def test_thinking_ends_when_its_budget_is_spent(prompt: str, text: str, expected: str) -> None:
    assert feed(answer(prompt, thinking_tokens=3, thinking_end_ids=CLOSE), text)[0] == expected


def test_without_a_budget_nothing_is_forced() -> None:
    assert feed(answer("<|assistant|><think>"), "x" * 50)[0] == "x" * 50


def test_end_tokens_are_barred_until_the_answer_is_long_enough() -> None:
    one = answer(min_tokens=2)
    barred = []
    for letter in "abc":
        barred.append(bool(one.barred_ids))
        feed(one, letter)

    assert barred == [True, True, False]


def test_an_end_token_finishes_without_text() -> None:
    assert feed(answer(), "ab<|user|>") == ("ab", FinishReason.STOP)


@pytest.mark.parametrize(
    ("tokens", "period"), [("aaaa", 1), ("abab", 2), ("abcab", 3), ("abcd", 4), ("aab", 3), ("", 0)]
)
def test_smallest_period(tokens: str, period: int) -> None:
    assert smallest_period([ord(c) for c in tokens]) == period


def test_varied_text_is_not_taken_for_repetition() -> None:
    text = " ".join(str(number) for number in range(200))

    assert feed(answer(max_tokens=2000, loop_window=64), text)[1] is None
