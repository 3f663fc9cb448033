"""A stream and a whole answer have equal fields, however the text is cut into tokens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from fake_model import fake_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from api.engine.request import Delta, Done, FinishReason, TokenLogprob
from api.engine.text.output import Detokenizer
from api.engine.text.tokenizer import Vocabulary
from api.parsing.output import OutputParser
from api.protocol.completion import Choice, Completion, PromptFacts

ROOT = Path(__file__).resolve().parents[3]
TOOLS = {
    "count": {"properties": {"color": {"type": "string"}, "limit": {"type": "integer"}, "deep": {"type": "object"}}},
    "look": {},
}
ATOMS = [
    "<think>", "</think>", "<|begin_of_box|>", "<|end_of_box|>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>",
    "<arg_value>", "</arg_value>", "count", "look", "color", "limit", "[[1,2,3,4]]", "(5,6,7,8)", "[[1,2],[3,4]]", "blue",
    '{"bbox_2d": [1,2,3,4], "label": "cat"}', '{"a": 1}', "3", '"x"', "image 1", "第二张图", "[", "<", ">", "{", "\n", " ", "hm", "红", "😀",
]  # fmt: skip
WHOLE = [
    "\n<think>why</think>\nIt is <|begin_of_box|>[[1,2,3,4]]<|end_of_box|>, or <|begin_of_box|>blue<|end_of_box|>.",
    "<tool_call>count\n<arg_key>color</arg_key>\n<arg_value>red</arg_value>\n<arg_key>limit</arg_key>\n<arg_value>3"
    "</arg_value>\n</tool_call>\n<tool_call>look\n</tool_call>",
    "<think>never closed",
    'Here: {"bbox_2d": [10,20,30,40], "label": "cat"} and so on',
    "In image 1 <|begin_of_box|>[[1,2,3,4]]<|end_of_box|>, in the second image <|begin_of_box|>[[5,6,7,8]]<|end_of_box|>.",
]
TEXTS = st.one_of(st.sampled_from(WHOLE), st.lists(st.sampled_from(ATOMS), max_size=14).map("".join))
VOCABULARY = fake_model().vocabulary


def cut(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(offset % (len(text) + 1) for offset in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def completion(literal: bool, choices: int = 1) -> Completion:
    prompt = PromptFacts(image_sizes=((200, 100), (40, 50)))
    made = [
        Choice(n, f"call_{n}", OutputParser(TOOLS, False, literal, images=2), prompt, VOCABULARY, True)
        for n in range(choices)
    ]
    return Completion("c", "r", "m", prompt, made, 0.0, 0.0)


def run(pieces: list[str], reason: FinishReason, literal: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    answer = completion(literal)
    chunks = answer.opening()
    deltas = []
    for number, piece in enumerate(pieces):
        logprob = TokenLogprob(number % 200, -0.5, ((number % 200, -0.5),))
        deltas.append(Delta(piece, 1, (logprob,)))
    while deltas:  # a client that lags gets more than one at once
        at_once = 1 + len(deltas) % 3
        chunks += answer.feed(0, deltas[:at_once])
        deltas = deltas[at_once:]
    chunks += answer.finish(0, Done(reason, 2, len(pieces), 0.0, 0.0, 0.0))
    return chunks, answer.body()


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A choice put together from its chunks, as a client does it."""
    message: dict[str, Any] = {}
    logprobs: list[Any] = []
    reasons = []
    for chunk in chunks:
        for part in chunk["choices"]:
            logprobs += (part["logprobs"] or {}).get("content", [])
            reasons += [part["finish_reason"]] if part["finish_reason"] else []
            for name, value in part["delta"].items():
                message[name] = value if name == "role" else message.get(name, type(value)()) + value
    return {"message": message, "logprobs": logprobs, "reasons": reasons}


def without_empty(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its empty fields."""
    calls = [{k: v for k, v in call.items() if k != "index"} for call in message.get("tool_calls", [])]
    return {k: v for k, v in {**message, "tool_calls": calls}.items() if v}


FAST = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@FAST
@given(TEXTS, st.lists(st.integers(0, 400), max_size=12), st.sampled_from(list(FinishReason)), st.booleans())
def test_chunks_add_up_to_the_whole(text: str, cuts: list[int], reason: FinishReason, literal: bool) -> None:
    chunks, body = run(cut(text, cuts), reason, literal)
    [choice] = body["choices"]
    stream = joined(chunks)

    assert without_empty(stream["message"]) == without_empty(choice["message"])
    assert stream["logprobs"] == choice["logprobs"]["content"] and len(stream["logprobs"]) == len(cut(text, cuts))
    assert stream["reasons"] == [choice["finish_reason"]]


@FAST
@given(TEXTS, st.lists(st.integers(0, 400), max_size=12), st.sampled_from(list(FinishReason)), st.booleans())
def test_every_cut_gives_the_same_answer(text: str, cuts: list[int], reason: FinishReason, literal: bool) -> None:
    whole = run([text], reason, literal)[1]["choices"][0]

    for pieces in (cut(text, cuts), list(text)):
        choice = run(pieces, reason, literal)[1]["choices"][0]
        assert choice["message"] == whole["message"]
        assert choice["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize("text", [*WHOLE, "红😀 <think>想</think>第二张图 <|begin_of_box|>蓝色<|end_of_box|>é"])
def test_real_tokens_and_every_cut_of_the_bytes_give_the_same_answer(text: str) -> None:
    """Cut by the demo model's own tokens, and in two at any byte, even inside a character."""
    vocabulary = Vocabulary(Tokenizer.from_file(str(ROOT / "models" / "shapes" / "tokenizer.json")))
    ids, data = vocabulary.encode(text), text.encode()
    tokens = [vocabulary.token_bytes(token) for token in ids]
    assert b"".join(tokens) == data and len(tokens) > 3
    cuts = [tokens, [data[n : n + 1] for n in range(len(data))], *([data[:n], data[n:]] for n in range(len(data)))]
    whole = run([text], FinishReason.STOP, literal=False)[1]["choices"][0]

    for pieces in cuts:
        detokenizer = Detokenizer(())
        texts = [detokenizer.feed(piece) for piece in pieces]
        chunks, body = run([*texts, detokenizer.finish()], FinishReason.STOP, literal=False)
        assert body["choices"][0]["message"] == whole["message"]
        assert without_empty(joined(chunks)["message"]) == without_empty(whole["message"])


@FAST
@given(TEXTS.filter(lambda text: not text.lstrip().startswith(("<think>", "<tool_call>"))))
def test_nothing_is_markup_in_a_literal_answer(text: str) -> None:
    [choice] = run(list(text), FinishReason.STOP, literal=True)[1]["choices"]

    assert choice["message"]["content"] == text.strip()


def test_choices_do_not_mix() -> None:
    answer = completion(False, choices=2)
    chunks = answer.opening()
    for left, right in zip("<think>a</think>one", "<think>b</think>two", strict=True):
        chunks += answer.feed(1, [Delta(right, 1)]) + answer.feed(0, [Delta(left, 1)])
    chunks += answer.finish(1, Done(FinishReason.STOP, 2, 5, 0.0, 0.0, 0.0))
    chunks += answer.finish(0, Done(FinishReason.LENGTH, 2, 6, 0.0, 0.0, 0.0))

    texts = [
        joined([{"choices": [p for p in chunk["choices"] if p["index"] == n]} for chunk in chunks])["message"]
        for n in (0, 1)
    ]
    assert [(t["content"], t["reasoning"]) for t in texts] == [("one", "a"), ("two", "b")]
    assert [c["finish_reason"] for c in answer.body()["choices"]] == ["length", "stop"]
    assert answer.usage()["completion_tokens"] == 11 and answer.usage()["prompt_tokens"] == 2
    assert "timings" in chunks[-1] and "timings" not in chunks[-2]
