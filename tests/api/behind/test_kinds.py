"""Which fields each kind of engine honours: all fields of a request are decided, and none is dropped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from api.behind.kinds import HERE, NAMES, WORDS, Kind, sampling_fields
from api.behind.question import bodies
from api.errors import ServingError
from api.protocol.fields import IgnoredFields
from api.protocol.schemas import ChatRequest, check_chat
from api.protocol.text_completion import TextRequest

KINDS: tuple[Kind, ...] = get_args(Kind)


def chat(**fields: Any) -> ChatRequest:
    return check_chat({"messages": [{"role": "user", "content": "hi"}], **fields}, IgnoredFields())


def test_every_field_of_a_request_is_decided() -> None:
    fields = set(ChatRequest.model_fields) | set(TextRequest.model_fields)

    assert fields == set(WORDS) | HERE and not set(WORDS) & HERE
    assert {kind for kinds in WORDS.values() for kind in kinds} <= set(KINDS)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("llama.cpp", "cache_salt", "x"), ("llama.cpp", "regex", "a+"), ("llama.cpp", "stop_token_ids", [1]), ("sglang", "choice", ["a"]),
        ("vllm", "grammar", "start: /a/"), ("vllm", "loop_window", 32), ("sglang", "thinking_token_budget", 9), ("other", "top_k", 3),
        ("sglang", "reasoning_effort", "low"), ("other", "reasoning_effort", "low"), ("vllm", "verbosity", "low"),
    ],
)  # fmt: skip
def test_a_field_that_the_engine_does_not_honour_is_refused_by_name(kind: Kind, field: str, value: Any) -> None:
    with pytest.raises(ServingError) as refused:
        sampling_fields(chat(**{field: value}), kind)

    assert (refused.value.status, refused.value.param, refused.value.code) == (400, field, "unsupported_parameter")
    assert f"`{field}` is not honoured by the engine behind" in refused.value.message


@pytest.mark.parametrize("kind", KINDS)
def test_what_asks_for_nothing_is_taken_by_every_engine(kind: Kind) -> None:
    asked = chat(min_tokens=0, ignore_eos=False, loop_window=0, continue_final_message=False, reasoning_effort="high")

    assert not {"loop_window", "add_generation_prompt", "continue_final_message"} & set(sampling_fields(asked, kind)) - (
        {"loop_window"} if kind == "glm" else set()
    )


def test_fields_get_the_words_of_the_engine() -> None:
    asked = chat(repetition_penalty=1.2, top_k=5)

    assert sampling_fields(asked, "llama.cpp") == {"repeat_penalty": 1.2, "top_k": 5}
    assert sampling_fields(asked, "vllm") == {"repetition_penalty": 1.2, "top_k": 5}
    assert sampling_fields(chat(regex="a+"), "vllm") == {"structured_outputs": {"regex": "a+"}}
    assert sampling_fields(chat(regex="a+"), "sglang") == {"regex": "a+"}
    assert sampling_fields(chat(reasoning_effort="low"), "vllm") == {"thinking_token_budget": 512}
    assert sampling_fields(chat(reasoning_effort="none"), "sglang") == {"chat_template_kwargs": {"enable_thinking": False}}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    assert sampling_fields(chat(response_format=schema), "llama.cpp") == {"response_format": schema}


def test_each_choice_is_a_question_of_its_own_with_a_seed_of_its_own() -> None:
    path, asked = bodies(chat(n=3, seed=7), "vllm", "m", 2048, [], "key:", 30)

    assert path == "/v1/chat/completions" and [body["seed"] for body in asked] == [7, 8, 9]
    assert all("n" not in body and body["max_tokens"] == 30 and body["cache_salt"] == "key:" for body in asked)


def test_an_answer_as_long_as_the_context_has_no_limit() -> None:
    """Engines refuse a limit that does not fit beside the prompt."""
    assert "max_tokens" not in bodies(chat(), "vllm", "m", 2048, [], "", 4096)[1][0]


def test_a_named_function_is_the_only_one_and_must_be_called() -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("a", "b")]
    named = {"type": "function", "function": {"name": "b"}}

    body = bodies(chat(tools=tools, tool_choice=named), "llama.cpp", "m", 2048, [], "", None)[1][0]

    assert body["tool_choice"] == "required" and [tool["function"]["name"] for tool in body["tools"]] == ["b"]
    assert "tools" not in bodies(chat(tools=tools, tool_choice="none"), "vllm", "m", 2048, [], "", None)[1][0]


def test_the_table_of_the_documentation_says_what_each_kind_honours() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.split("| field |")[1].split("\n\n")[0].splitlines()[2:]]
    told = set()
    for fields, *cells in rows:
        for name in set(re.findall(r"`(\w+)`", fields)) & set(WORDS):
            told.add(name)
            for kind, cell in zip(NAMES, cells, strict=True):
                assert (cell != "no") == (kind in WORDS[name]), (name, kind)
                word = cell.strip("`")
                assert word in ("yes", "no", "sent", "structured_outputs", WORDS[name].get(kind)), (name, kind)

    assert set(WORDS) - told == {"presence_penalty", "frequency_penalty", "top_logprobs"}, "these are told as penalties and logprobs"
