"""The table of fields in docs/api.md is generated from the schema, and every field has an effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_model import fake_model
from field_table import NOTES, PAGE, table, with_table
from served import Served, chat_body

from api.engine.request import Request
from api.protocol.schemas import HARMLESS, HINTS, WITHOUT_EFFECT, ChatRequest

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
Check = Callable[[list[Request], Any], bool]
BEGUN = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "It is "}]


def token(text: str) -> int:
    (ident,) = fake_model().vocabulary.encode(text)
    return ident


def prompt(requests: list[Request]) -> str:
    return b"".join(map(fake_model().vocabulary.token_bytes, requests[0].prompt_ids)).decode()


# Evidence that a field is honoured: the fields sent, and a check of the engine's requests and the answer.
WITNESSES: dict[str, tuple[dict[str, Any], Check]] = {
    "messages": ({}, lambda r, a: "hello" in text(a)),
    "model": ({"model": "fake"}, lambda r, a: a["model"] == "fake"),
    "max_tokens": ({"max_tokens": 3}, lambda r, a: r[0].sampling.max_tokens == 3 and len(text(a)) == 3),
    "max_completion_tokens": ({"max_completion_tokens": 3}, lambda r, a: r[0].sampling.max_tokens == 3),
    "min_tokens": ({"min_tokens": 3}, lambda r, a: r[0].sampling.min_tokens == 3),
    "ignore_eos": ({"ignore_eos": True, "max_tokens": 5},
                   lambda r, a: r[0].sampling.ignore_eos and r[0].sampling.loop_window == 0),
    "stop": ({"stop": ["see"]}, lambda r, a: text(a) == "I"),
    "stop_token_ids": ({"stop_token_ids": [token("s")]}, lambda r, a: text(a) == "I"),
    "include_stop_str_in_output": ({"stop": ["see"], "include_stop_str_in_output": True}, lambda r, a: text(a) == "I see"),
    "n": ({"n": 3}, lambda r, a: len(a["choices"]) == len(r) == 3),
    "loop_window": ({"loop_window": 0}, lambda r, a: r[0].sampling.loop_window == 0),
    "temperature": ({"temperature": 0.5}, lambda r, a: r[0].sampling.temperature == 0.5),
    "top_p": ({"top_p": 0.5}, lambda r, a: r[0].sampling.top_p == 0.5),
    "top_k": ({"top_k": 5}, lambda r, a: r[0].sampling.top_k == 5),
    "min_p": ({"min_p": 0.5}, lambda r, a: r[0].sampling.min_p == 0.5),
    "repetition_penalty": ({"repetition_penalty": 1.5}, lambda r, a: r[0].sampling.repetition_penalty == 1.5),
    "presence_penalty": ({"presence_penalty": -1}, lambda r, a: r[0].sampling.presence_penalty == -1),
    "frequency_penalty": ({"frequency_penalty": 1}, lambda r, a: r[0].sampling.frequency_penalty == 1),
    "logit_bias": ({"logit_bias": {"5": -100}}, lambda r, a: r[0].sampling.logit_bias == ((5, -100),)),
    "seed": ({"seed": 7, "n": 2}, lambda r, a: [q.sampling.seed for q in r] == [7, 8]),
    "logprobs": ({"logprobs": True}, lambda r, a: r[0].sampling.logprobs == 0 and "content" in a["choices"][0]["logprobs"]),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 4}, lambda r, a: r[0].sampling.logprobs == 4),
    "response_format": ({"response_format": JSON}, lambda r, a: r[0].sampling.grammar is not None),
    "regex": ({"regex": "[a-z]+"}, lambda r, a: r[0].sampling.grammar is not None),
    "choice": ({"choice": ["yes", "no"]}, lambda r, a: r[0].sampling.grammar is not None),
    "grammar": ({"grammar": 'start: "yes"'}, lambda r, a: r[0].sampling.grammar is not None),
    "verbosity": ({"verbosity": "low"}, lambda r, a: "as briefly as possible" in prompt(r)),
    "functions": ({"functions": [TOOL["function"]]}, lambda r, a: a["usage"]["prompt_tokens"] > 30),
    "function_call": ({"functions": [TOOL["function"]], "function_call": {"name": "look"}},
                      lambda r, a: r[0].sampling.grammar is not None),
    "add_generation_prompt": ({"messages": BEGUN, "add_generation_prompt": False, "continue_final_message": True},
                              lambda r, a: prompt(r).endswith("</think>\nIt is ")),
    "continue_final_message": ({"messages": BEGUN, "continue_final_message": True},
                               lambda r, a: prompt(r).endswith("</think>\nIt is ")),
    "request_id": ({"request_id": "mine/1"}, lambda r, a: a["request_id"] == "mine/1"),
    "tools": ({"tools": [TOOL]}, lambda r, a: r[0].sampling.grammar is None and a["usage"]["prompt_tokens"] > 30),
    "tool_choice": ({"tools": [TOOL], "tool_choice": "required"}, lambda r, a: r[0].sampling.grammar is not None),
    "parallel_tool_calls": ({"tools": [TOOL], "parallel_tool_calls": False},
                            lambda r, a: r[0].sampling.grammar is not None),
    "chat_template_kwargs": ({"chat_template_kwargs": {"enable_thinking": False}}, lambda r, a: closes_thinking(r)),
    "reasoning_effort": ({"reasoning_effort": "none"}, lambda r, a: closes_thinking(r)),
    "thinking_token_budget": ({"thinking_token_budget": 9},
                              lambda r, a: r[0].sampling.thinking_tokens == 9 and len(r[0].sampling.thinking_end_ids) == 1),
    "cache_salt": ({"cache_salt": "x"}, lambda r, a: r[0].salt == "default:x"),
}  # fmt: skip
# Form of the answer: tested below, and in test_vendor_words.py.
SHAPE = {"stream", "stream_options", "skip_special_tokens", "include_reasoning", "separate_reasoning"}


def text(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


def closes_thinking(requests: list[Request]) -> bool:
    special = fake_model().vocabulary.special
    return requests[0].prompt_ids[-2:] == (special["<think>"], special["</think>"])


@pytest.fixture
def recorded(serve) -> tuple[Served, list[Request]]:
    """A server, and the requests that it submits to its engine."""
    served = serve()
    requests: list[Request] = []
    submit = served.engine.submit
    served.engine.submit = lambda request, deliver: requests.append(request) or submit(request, deliver)
    return served, requests


def test_the_page_has_the_table_of_the_schema() -> None:
    page = PAGE.read_text("utf-8")

    assert table() in page and with_table(page) == page, "run: python tests/api/field_table.py"


def test_every_field_has_a_witness() -> None:
    assert set(ChatRequest.model_fields) == set(WITNESSES) | SHAPE
    assert set(NOTES) <= set(ChatRequest.model_fields)


@pytest.mark.parametrize("name", WITNESSES)
def test_a_field_reaches_the_engine_or_the_answer(name: str, recorded) -> None:
    served, requests = recorded
    fields, holds = WITNESSES[name]
    # With a grammar the request fails, since the fake model's text does not match it.
    answer = served.client.post("/v1/chat/completions", json=chat_body("hello", **fields))

    assert requests, answer.text
    assert holds(requests, answer.json() if answer.status_code == 200 else None)


def test_stream_and_stream_options_select_the_form_of_the_answer(recorded) -> None:
    served, _ = recorded

    assert served.chat(stream=False).json()["object"] == "chat.completion"
    assert served.stream(stream_options={"include_usage": True})[-2]["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("name", sorted({**HARMLESS, **HINTS}))
def test_an_ignored_field_changes_nothing(name: str, recorded) -> None:
    served, requests = recorded

    served.chat("hello")
    answer = served.chat("hello", **{name: {"any": "thing"}})
    assert answer.json()["ignored"] == [name]

    first, second = requests
    assert (first.prompt_ids, first.sampling, first.salt) == (second.prompt_ids, second.sampling, second.salt)


@pytest.mark.parametrize("name", ["made_up", "suffix", "best_of", "video", *sorted(WITHOUT_EFFECT)])
def test_other_fields_are_refused_by_name(name: str, recorded) -> None:
    served, requests = recorded

    error = served.chat("hello", **{name: {"other": 1}}).json()["error"]

    assert error["param"] == name and requests == []
