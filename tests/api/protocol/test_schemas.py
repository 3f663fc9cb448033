"""Every field is honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.errors import ServingError
from api.protocol.body import MAX_DEPTH
from api.protocol.fields import IgnoredFields
from api.protocol.schemas import HARMLESS, WITHOUT_EFFECT, parse_chat

TOOL = {"type": "function", "function": {"name": "f"}}
USER = {"role": "user", "content": "hello"}


def parse(**fields: Any):
    return parse_chat(json.dumps({"messages": [USER], **fields}).encode(), IgnoredFields())


def refusal(**fields: Any) -> ServingError:
    with pytest.raises(ServingError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 100.5}, "temperature", "`temperature` must be <= 100. Given: 100.5"),
        ({"temperature": -1}, "temperature", "`temperature` must be >= 0. Given: -1"),
        ({"temperature": "hot"}, "temperature", '`temperature` must be a number. Given: "hot"'),
        ({"temperature": float("nan")}, "temperature", "`temperature` must be a finite number. Given: NaN"),
        ({"top_p": 1.1}, "top_p", "`top_p` must be <= 1. Given: 1.1"),
        ({"top_k": -2}, "top_k", "`top_k` must be >= -1. Given: -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "`repetition_penalty` must be > 0. Given: 0"),
        ({"max_tokens": -2}, "max_tokens", "`max_tokens` must be >= 1. Given: -2"),
        ({"n_predict": -2}, "n_predict", "`n_predict` must be >= 1. Given: -2"),
        ({"max_tokens": 1.5}, "max_tokens", "`max_tokens` must be an integer. Given: 1.5"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens", "must be an integer"),
        ({"seed": True}, "seed", "`seed` must be an integer. Given: true"),
        ({"stream": "yes"}, "stream", '`stream` must be true or false. Given: "yes"'),
        ({"stop": ["a"] * 65}, "stop", "`stop` must have <= 64 strings. Given: 65"),
        ({"stop": [1]}, "stop", "`stop` must be a string or a list of strings"),
        ({"n": 9}, "n", "`n` must be <= 8. Given: 9"),
        ({"n": 0}, "n", "`n` must be >= 1. Given: 0"),
        ({"min_p": 2}, "min_p", "`min_p` must be <= 1. Given: 2"),
        ({"presence_penalty": 3}, "presence_penalty", "must be <= 2. Given: 3"),
        ({"frequency_penalty": -3}, "frequency_penalty", "must be >= -2. Given: -3"),
        ({"logprobs": 1}, "logprobs", "`logprobs` must be true or false. Given: 1"),
        ({"top_logprobs": 3}, "top_logprobs", "needs `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be <= 20. Given: 21"),
        ({"response_format": {"type": "xml"}}, "response_format", "one of 'text', 'json_object', 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "required"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "must be token ids. Given: \"the\""),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100. Given: 101"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "must have <= 1024 tokens. Given: 1025"),
        ({"min_tokens": -1}, "min_tokens", "`min_tokens` must be >= 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "must be <= 8"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos", "`response_format`"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "must be >= 0"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "must be 'none', 'minimal', 'low'"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning_effort", "contradicts",
        ),
        ({"loop_window": 5000}, "loop_window", "must be <= 4096"),
        ({"cache_salt": ""}, "cache_salt", "must have >= 1 characters"),
        ({"best_of": 2}, "best_of", "`best_of` must be 1. Given: 2"),
        ({"made_up": 1}, "made_up", "`made_up` is not supported."),
        ({"made_up": [[[[1]]]]}, "made_up", "`made_up` is not supported."),
        ({"tool_choice": "maybe"}, "tool_choice", "`tool_choice` must be 'auto', 'none' or 'required'. Given: \"maybe\""),
        ({"tool_choice": 1}, "tool_choice", "or an object that names a function"),
        ({"tool_choice": "required"}, "tool_choice", "there are no `tools`"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "not among"),
        ({"tools": [TOOL, TOOL]}, "tools", "two functions have the name 'f'"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "`stream_options.other` is not supported."),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs.a", "`chat_template_kwargs.a` is not supported."),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking", "true or false"),
        ({"messages": []}, "messages", "`messages` must have >= 1 items. Given: 0"),
        ({"messages": "x"}, "messages", "`messages` must be a list"),
        ({"messages": ["x"]}, "messages[0]", "`messages[0]` must be an object"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role", "Given: \"bot\""),
        ({"messages": [{"role": "user"}]}, "messages[0]", "needs `content`"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "`messages[1].role` is required."),
        ({"messages": [{**USER, "images": ["x"]}]}, "messages[0].images", "is not supported"),
        ({"messages": [{**USER, "content": 7}]}, "messages[0].content", "a string or a list of parts. Given: 7"),
        (content({"type": "video_url"}), "messages[0].content[0]", "one of 'text', 'image_url'"),
        (content(7), "messages[0].content[0]", "one of 'text', 'image_url'"),
        (content({"type": "text"}), "messages[0].content[0].text", "is required"),
        (content({"type": "image_url", "image_url": 7}), "messages[0].content[0].image_url", "must be an object"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "must match ^["),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages[0]", "pictures belong to",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            "messages[0].tool_calls[0].function.arguments", "must be a JSON object in a string",
        ),
    ],
)  # fmt: skip
def test_an_invalid_field_is_named_with_its_limit(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**fields)

    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"", "at character 0"), (b'{"a" 1}', "Expecting ':' delimiter at character 5"), (b"[]", "Given: []"),
     (b"null", "Given: null"), (b'"x"', 'Given: "x"'), (b"[" * 100_000, "cannot be parsed"),
     (b'{"a": ' + b"9" * 5000 + b"}", "cannot be parsed"), (b"{\xff\xfe}", "UTF-8")],
)  # fmt: skip
def test_anything_but_a_json_object_is_refused_with_the_reason(body: bytes, words: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse_chat(body, IgnoredFields())

    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert words in caught.value.message and len(caught.value.message) < 150


@pytest.mark.parametrize("shape", ["[%s]", '{"a": %s}'])
def test_a_field_nested_too_deeply_is_refused_by_name(shape: str) -> None:
    value = "1"
    for _ in range(MAX_DEPTH + 1):
        value = shape % value
    with pytest.raises(ServingError) as caught:
        parse_chat(f'{{"messages": [], "tools": {value}}}'.encode(), IgnoredFields())

    assert (caught.value.param, caught.value.code) == ("tools", "too_deep")


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ServingError) as caught:
        parse_chat(b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', IgnoredFields())
    assert "whole Unicode characters" in caught.value.message

    arguments = {"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}
    assert "function.arguments`" in refusal(messages=[{"role": "assistant", "tool_calls": [arguments]}]).message


def test_an_escaped_surrogate_pair_is_one_character() -> None:
    assert parse(messages=[{"role": "user", "content": "😀"}]).messages[0].content == "😀"


def test_an_error_never_repeats_a_whole_value() -> None:
    assert len(refusal(temperature="x" * 10_000).message) < 200


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_fields_are_accepted(name: str) -> None:
    parse(**{name: "anything"})


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_fields_of_other_servers_are_accepted_with_the_value_that_holds_here(name: str) -> None:
    for value in (*WITHOUT_EFFECT[name], None):
        parse(**{name: value})


def test_an_answer_can_be_sent_back_unchanged() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {
        "role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "reasoning": "r", "reasoning_content": "r", "boxes": [{"bbox_2d": [1, 2, 3, 4]}],
        "tool_calls": [call],
    }  # fmt: skip

    chat = parse(messages=[USER, answer, {"role": "tool", "tool_call_id": "c", "content": "3"}])

    assert chat.messages[1].tool_calls is not None


def test_the_given_values_are_used() -> None:
    chat = parse(stop="x", tools=[{"type": "function", "function": {"name": "f"}}], max_completion_tokens=3)

    assert (chat.stop_strings, len(chat.active_tools), chat.requested_max_tokens) == (("x",), 1, 3)
    assert chat.enable_thinking is True
    assert parse(chat_template_kwargs={"enable_thinking": False}).enable_thinking is False
    assert parse(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none").active_tools == []


def test_a_named_tool_is_the_only_one_and_must_be_called() -> None:
    other = {"type": "function", "function": {"name": "g"}}
    chat = parse(tools=[TOOL, other], tool_choice={"type": "function", "function": {"name": "g"}})

    assert [tool.function.name for tool in chat.active_tools] == ["g"] and chat.must_call
    assert parse(tools=[TOOL], tool_choice="required").must_call
    assert not parse(tools=[TOOL], tool_choice="auto").must_call


@pytest.mark.parametrize(
    ("fields", "thinking", "tokens"),
    [
        ({}, True, None),
        ({"reasoning_effort": "none"}, False, None),
        ({"reasoning_effort": "low"}, True, 512),
        ({"reasoning_effort": "high"}, True, None),
        ({"reasoning_effort": "low", "thinking_token_budget": 7}, True, 7),
        ({"thinking_token_budget": 0}, True, 0),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, None),
        ({"chat_template_kwargs": {}}, True, None),
    ],
)
def test_the_limit_of_reasoning(fields: dict[str, Any], thinking: bool, tokens: int | None) -> None:
    chat = parse(**fields)

    assert (chat.enable_thinking, chat.thinking_tokens) == (thinking, tokens)


def test_response_format_gives_a_schema() -> None:
    schema = {"type": "object", "properties": {}}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}

    assert parse(response_format=response_format).answer_schema == schema
    assert parse(response_format={"type": "json_object"}).answer_schema == {"type": "object"}
    assert parse(response_format={"type": "text"}).answer_schema is None
