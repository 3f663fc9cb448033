"""Other servers' words do what they do there."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from served import chat_body, image_part, sse_data

from api.errors import ServingError
from api.protocol.fields import IgnoredFields
from api.protocol.schemas import ChatRequest, parse_chat
from api.protocol.vendor_words import WITHOUT_LIMIT

USER = {"role": "user", "content": "hello"}
LOOK = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": LOOK}, {"type": "function", "function": {"name": "go"}}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}}
URL = image_part()["image_url"]["url"]
BARE = URL.partition(",")[2]


def parse(**fields: Any) -> tuple[ChatRequest, list[str]]:
    ignored = IgnoredFields()
    return parse_chat(json.dumps({"messages": [USER], **fields}).encode(), ignored), ignored.names


def test_an_empty_thinking_asks_for_nothing() -> None:
    chat, ignored = parse(thinking={})

    assert chat.enable_thinking == parse()[0].enable_thinking and ignored == ["thinking"]


def names(chat: ChatRequest) -> list[str]:
    return [tool.function.name for tool in chat.active_tools]


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({"thinking": {"type": "disabled"}}, lambda c: not c.enable_thinking),
        ({"thinking": {"type": "enabled"}}, lambda c: c.enable_thinking and c.thinking_tokens is None),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, lambda c: c.thinking_tokens == 9),
        ({"thinking": {"type": "adaptive"}}, lambda c: c.enable_thinking),
        ({"think": False}, lambda c: not c.enable_thinking),
        ({"think": "low"}, lambda c: c.thinking_tokens == 512),
        ({"enable_thinking": False}, lambda c: not c.enable_thinking),
        ({"enable_thinking": True, "thinking_budget": 7}, lambda c: c.thinking_tokens == 7),
        ({"chat_template_kwargs": {"thinking": False}}, lambda c: not c.enable_thinking),
        ({"prompt_mode": "reasoning"}, lambda c: c.enable_thinking),
        ({"reasoning": {"effort": "low"}}, lambda c: c.thinking_tokens == 512),
        ({"reasoning": {"effort": "none"}}, lambda c: not c.enable_thinking),
        ({"reasoning": {"max_tokens": 11}}, lambda c: c.thinking_tokens == 11),
        ({"reasoning": {"enabled": False}}, lambda c: not c.enable_thinking),
        ({"reasoning": {"exclude": True}}, lambda c: c.reasoning_place == "nowhere"),
        ({"include_reasoning": False}, lambda c: c.reasoning_place == "nowhere"),
        ({"include_reasoning": True}, lambda c: c.reasoning_place == "separate"),
        ({"separate_reasoning": False}, lambda c: c.reasoning_place == "inline"),
        ({"reasoning_format": "none"}, lambda c: c.reasoning_place == "inline"),
        ({"reasoning_format": "auto"}, lambda c: c.reasoning_place == "separate"),
        ({"reasoning_format": "hidden"}, lambda c: c.reasoning_place == "nowhere"),
        ({"reasoning_effort": "auto"}, lambda c: c.enable_thinking and c.thinking_tokens is None),
        ({"reasoning_effort": "max"}, lambda c: c.enable_thinking and c.thinking_tokens is None),
        ({"do_sample": False, "temperature": 0.7}, lambda c: c.temperature == 0),
        ({"do_sample": True, "temperature": 0.7}, lambda c: c.temperature == 0.7),
        ({"temperature": 2.5}, lambda c: c.temperature == 2.5),
        ({"max_tokens": -1}, lambda c: c.requested_max_tokens == WITHOUT_LIMIT),
        ({"max_completion_tokens": -1}, lambda c: c.requested_max_tokens == WITHOUT_LIMIT),
        ({"max_tokens": 0}, lambda c: c.requested_max_tokens is None),
        ({"max_tokens": 9, "max_completion_tokens": 5}, lambda c: c.requested_max_tokens == 5),
        ({"n_predict": -1}, lambda c: c.requested_max_tokens == WITHOUT_LIMIT),
        ({"n_predict": 4}, lambda c: c.requested_max_tokens == 4),
        ({"max_new_tokens": 4}, lambda c: c.requested_max_tokens == 4),
        ({"random_seed": 4}, lambda c: c.seed == 4),
        ({"repeat_penalty": 1.2}, lambda c: c.repetition_penalty == 1.2),
        ({"stop_sequences": ["a"]}, lambda c: c.stop_strings == ("a",)),
        ({"stop": ["a", "", "b", "c", "d", "e"]}, lambda c: c.stop_strings == ("a", "b", "c", "d", "e")),
        ({"stop": ""}, lambda c: c.stop_strings == ()),
        ({"stop": []}, lambda c: c.stop_strings == ()),
        ({"no_stop_trim": True}, lambda c: c.include_stop_str_in_output),
        ({"guided_json": SCHEMA}, lambda c: c.answer_schema == SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, lambda c: c.answer_schema == SCHEMA),
        ({"json_schema": SCHEMA}, lambda c: c.answer_schema == SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, lambda c: c.answer_schema == SCHEMA),
        ({"structured_outputs": {"json_object": True}}, lambda c: c.answer_schema == {"type": "object"}),
        ({"structured_outputs": {"choice": ["a", "b"], "regex": None}}, lambda c: c.choice == ["a", "b"]),
        ({"structured_outputs": {"regex": "a+"}}, lambda c: c.regex == "a+"),
        ({"guided_choice": ["a", "b"]}, lambda c: c.choice == ["a", "b"]),
        ({"guided_regex": "a+"}, lambda c: c.regex == "a+"),
        ({"guided_grammar": 'root ::= "a"'}, lambda c: c.grammar == 'root ::= "a"'),
        ({"ebnf": 'root ::= "a"'}, lambda c: c.grammar == 'root ::= "a"'),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, lambda c: c.answer_schema == SCHEMA),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, lambda c: c.answer_schema == SCHEMA),
        ({"response_format": {"type": "json", "value": SCHEMA}}, lambda c: c.answer_schema == SCHEMA),
        ({"response_format": {"type": "regex", "value": "a+"}}, lambda c: c.regex == "a+"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}, "value": None}},
         lambda c: c.answer_schema == SCHEMA),
        ({"functions": [LOOK]}, lambda c: names(c) == ["look"] and c.uses_functions and not c.many_calls),
        ({"functions": [LOOK], "function_call": "none"}, lambda c: names(c) == []),
        ({"functions": [LOOK], "function_call": {"name": "look"}}, lambda c: c.must_call),
        ({"tools": TOOLS, "tool_choice": "any"}, lambda c: c.must_call),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, lambda c: c.must_call),
        ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, lambda c: not c.must_call),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "go"}}, lambda c: c.must_call and names(c) == ["go"]),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "go"}}, lambda c: c.must_call and names(c) == ["go"]),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "go"}}]}}},
         lambda c: c.must_call and names(c) == ["go"]),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "go"}]}},
         lambda c: not c.must_call and names(c) == ["go"]),
        ({"tools": [{"type": "function", **LOOK}]}, lambda c: names(c) == ["look"]),
        ({"tools": [{"function": LOOK}]}, lambda c: names(c) == ["look"]),
        ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, lambda c: names(c) == ["a" * 65]),
        ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(200)]}, lambda c: len(names(c)) == 200),
        ({"tools": [*TOOLS, {"type": "web_search", "web_search": {"enable": False}}]}, lambda c: names(c) == ["look", "go"]),
        ({"extra_body": {"top_k": 3}}, lambda c: c.top_k == 3),
        ({"stream": True, "usage": {"include": True}}, lambda c: c.stream_options.include_usage),
        ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
         lambda c: c.stream_options.continuous_usage_stats),
    ],
)  # fmt: skip
def test_another_word_is_honoured(fields: dict[str, Any], holds: Callable[[ChatRequest], bool]) -> None:
    assert holds(parse(**fields)[0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": {"type": "disabled"}, "enable_thinking": True}, "enable_thinking"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "reasoning.effort"),
        ({"n_predict": 3, "max_tokens": 4}, "n_predict"),
        ({"extra_body": {"top_k": 3}, "top_k": 4}, "extra_body.top_k"),
        ({"regex": "a", "choice": ["b"]}, "regex"),
        ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": {"a": 1}}}, "structured_outputs.structural_tag"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"thinking": 5}, "thinking"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"made_up": 1}}, "reasoning.made_up"),
        ({"reasoning_format": "other"}, "reasoning_format"),
        ({"prompt_mode": "other"}, "prompt_mode"),
        ({"guided_json": "{"}, "guided_json"),
        ({"usage": 1}, "usage"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"samplers": ["made_up"]}, "samplers"),
        ({"repeat_last_n": 64, "repeat_penalty": 1.3}, "repeat_last_n"),
        ({"sensitive_word_check": {"type": "ALL"}}, "sensitive_word_check"),
        ({"random_seed": "x"}, "random_seed"),
        ({"functions": [LOOK], "function_call": {"name": "go"}}, "function_call"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [{"type": "web_search", "web_search": {"enable": True}}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}], "add_generation_prompt": True, "continue_final_message": True},
         "add_generation_prompt"),
        ({"extra_body": 3}, "extra_body"),
    ],
)  # fmt: skip
def test_contradictions_and_promises_are_refused_in_the_callers_words(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse(**fields)

    assert (caught.value.status, caught.value.param) == (400, param)
    assert f"`{param}" in caught.value.message


def test_what_is_left_out_in_translation_is_named() -> None:
    chat, ignored = parse(stop=["a", ""], max_tokens=0, stream_options={"include_usage": True}, max_completion_tokens=4)

    assert (chat.stop_strings, chat.requested_max_tokens) == (("a",), 4)
    assert set(ignored) == {"stop", "max_tokens", "stream_options"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": BARE}},
        {"type": "image", "image": URL},
        {"type": "image", "image": BARE},
        {"type": "image", "url": URL},
        {"type": "image", "base64": BARE},
        {"type": "image", "image_url": {"url": URL}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BARE}},
        {"type": "image", "source": {"type": "url", "url": URL}},
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "file", "file": {"filename": "a.png", "file_data": URL}},
    ],
)
def test_every_form_of_an_image_is_the_same_image(part: dict[str, Any], serve) -> None:
    answer = serve().chat([{"type": "input_text", "text": "what is it?"}, part])

    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 4
    assert "ignored" not in answer.json()


OTHER = f"data:image/png;base64,{'A' * 80}"


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "image", "image": URL, "url": OTHER}, "url"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BARE}, "base64": OTHER}, "source"),
        ({"type": "image_url", "image_url": {"url": URL}, "data": OTHER}, "data"),
        ({"type": "image", "source": {"type": "base64", "data": BARE, "url": OTHER}}, "source.data"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "banana"}}, "image_url.detail"),
        ({"type": "input_image", "image_url": URL, "detail": 7}, "detail"),
    ],
)
def test_a_part_that_contradicts_itself_is_refused_by_name(part: dict[str, Any], field: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse(messages=[{"role": "user", "content": ["look", part]}])

    assert (caught.value.status, caught.value.param) == (400, f"messages[0].content[1].{field}")


def test_two_words_for_the_same_picture_agree() -> None:
    source = {"type": "base64", "media_type": "image/jpeg", "data": BARE}
    chat, ignored = parse(messages=[{"role": "user", "content": [{"type": "image", "source": source, "base64": BARE}]}])

    assert chat.messages[0].content[0].image_url.url.endswith(BARE) and not ignored


def test_the_detail_of_a_picture_is_named_and_low_promises_nothing() -> None:
    def asked(detail: str | None, strict: bool = False) -> list[str]:
        data = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL, "detail": detail}}]}]}
        parse_chat(json.dumps(data).encode(), ignored := IgnoredFields(strict))
        return ignored.names

    assert asked("auto") == []
    assert asked("low") == asked("high", strict=True) == ["messages[].content[].image_url.detail"]
    with pytest.raises(ServingError, match=r"image_url\.detail` is not supported"):
        asked("low", strict=True)


def test_bare_base64_may_have_the_alphabet_of_urls(serve) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "JPEG")
    bare = base64.urlsafe_b64encode(buffer.getvalue()).decode()
    assert bare.startswith("_9j_")

    answer = serve().chat([{"type": "image", "image": bare}])

    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 4


@pytest.mark.parametrize("kind", ["file", "video_url", "input_audio", "image"])
def test_other_parts_are_refused_by_their_place(kind: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse(messages=[{"role": "user", "content": [{"type": kind, kind: {"file_data": "data:application/pdf;base64,AA"}}]}])

    assert caught.value.status == 400 and caught.value.param.startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "user", "content": None}, None),
        ({"role": "user", "content": []}, ""),
        ({"role": "assistant", "content": None}, None),
        ({"role": "assistant"}, None),
        ({"role": "tool", "tool_call_id": "c", "content": None}, None),
        ({"role": "assistant", "content": None, "refusal": "No."}, "No."),
    ],
)
def test_messages_may_be_empty(message: dict[str, Any], content: Any) -> None:
    assert parse(messages=[USER, message, USER])[0].messages[1].content == content


@pytest.mark.parametrize(
    ("given", "arguments"), [({"at": "me"}, '{"at": "me"}'), ("", "{}"), (None, "{}"), ('{"at": "me"}', '{"at": "me"}')]
)
def test_arguments_of_earlier_calls_have_several_forms(given: Any, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": given}, "extra_content": {"a": 1}}
    chat, ignored = parse(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER])

    assert chat.messages[1].tool_calls[0].function.arguments == arguments
    assert ignored == ["messages[].tool_calls[].extra_content"]


def test_reasoning_may_be_a_part() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}]

    message = parse(messages=[USER, {"role": "assistant", "content": parts}, USER])[0].messages[1]

    assert (message.reasoning_content, message.content[0].text) == ("hm", "yes")


def test_the_older_form_of_calls_goes_both_ways(serve) -> None:
    served = serve(answer=lambda prompt, images: "<tool_call>look\n<arg_key>at</arg_key><arg_value>me</arg_value></tool_call>")
    call = {"name": "look", "arguments": '{"at": "it"}'}
    messages = [USER, {"role": "assistant", "content": None, "function_call": call},
                {"role": "function", "name": "look", "content": "seen"}]  # fmt: skip

    body = {"messages": messages, "functions": [LOOK]}
    choice = served.client.post("/v1/chat/completions", json=body).json()["choices"][0]
    events = sse_data(served.client.post("/v1/chat/completions", json={**body, "stream": True}).text)[:-1]
    deltas = [event["choices"][0] for event in events]

    assert choice["finish_reason"] == deltas[-1]["finish_reason"] == "function_call"
    assert json.loads(choice["message"]["function_call"]["arguments"]) == {"at": "me"}
    assert [d["delta"]["function_call"]["name"] for d in deltas if "function_call" in d["delta"]] == ["look"]
    assert "tool_calls" not in choice["message"]
    assert parse(**body)[0].messages[2].tool_call_id == parse(**body)[0].messages[1].tool_calls[0].id


THOUGHTFUL = "<think>let me see</think>It is red."


@pytest.mark.parametrize(
    ("fields", "content", "reasoning"),
    [
        ({}, "It is red.", "let me see"),
        ({"include_reasoning": False}, "It is red.", None),
        ({"separate_reasoning": False}, "<think>let me see</think>\nIt is red.", None),
    ],
)
def test_the_reasoning_goes_where_it_is_wanted(fields: dict[str, Any], content: str, reasoning: Any, serve) -> None:
    served = serve(answer=lambda prompt, images: THOUGHTFUL)

    whole = served.chat("x", **fields).json()
    events = [event["choices"][0]["delta"] for event in served.stream("x", **fields)[:-1]]

    assert whole["choices"][0]["message"]["content"] == content
    assert whole["choices"][0]["message"].get("reasoning_content") == reasoning
    assert "".join(delta.get("content", "") for delta in events) == content
    assert ("".join(delta.get("reasoning_content", "") for delta in events) or None) == reasoning
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_reasoning_without_an_answer_is_closed_in_the_content(serve) -> None:
    served = serve(answer=lambda prompt, images: "<think>let me see and see")

    content = served.chat("x", separate_reasoning=False, max_tokens=12).json()["choices"][0]["message"]["content"]

    assert content.startswith("<think>let") and content.rstrip().endswith("</think>")


@pytest.mark.parametrize("skip", [True, False])
def test_box_tags_stay_in_the_content_if_wanted(skip: bool, serve) -> None:
    text = "There: <|begin_of_box|>[[1, 2, 3, 4]]<|end_of_box|> and <|begin_of_box|>red<|end_of_box|>."
    served = serve(answer=lambda prompt, images: text)

    message = served.chat("x", skip_special_tokens=skip).json()["choices"][0]["message"]

    assert message["boxes"] == [{"bbox_2d": [1, 2, 3, 4]}]
    assert message["content"] == ("There: [[1, 2, 3, 4]] and red." if skip else text)


def test_the_answer_goes_on_with_the_last_message(serve) -> None:
    served = serve(answer=lambda prompt, images: " red." if prompt.endswith("</think>\nIt is") else f"wrong: {prompt}")
    messages = [USER, {"role": "assistant", "content": "It is"}]

    answers = [
        served.client.post("/v1/chat/completions", json={"messages": messages, "continue_final_message": True, **fields})
        for fields in ({}, {"enable_thinking": False}, {"add_generation_prompt": False})
    ]

    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [" red."] * 3


def test_the_usage_so_far_is_in_every_chunk(serve) -> None:
    events = serve().stream("hello", stream_options={"continuous_usage_stats": True})[:-1]
    counts = [event["usage"]["completion_tokens"] for event in events]

    assert counts[0] == 0 and counts == sorted(counts) and len(set(counts)) > 3
    assert len({event["usage"]["prompt_tokens"] for event in events}) == 1
    assert events[-1]["usage"]["total_tokens"] >= events[-2]["usage"]["total_tokens"]


def test_a_request_id_in_the_body_is_the_answers(serve) -> None:
    served = serve()
    answer = served.client.post("/v1/chat/completions", json=chat_body(request_id="caller's own"))

    assert answer.json()["request_id"] == "caller's own" and answer.headers["x-request-id"] != "caller's own"


def test_what_the_template_does_not_read_is_named() -> None:
    turns = [USER, {"role": "assistant", "content": "a", "reasoning_content": "r"}, {**USER, "name": "Ann"}]

    assert parse(messages=turns)[1] == ["messages[].name", "messages[].reasoning_content"]
    assert parse(messages=[USER, {"role": "assistant", "content": "a", "reasoning_content": "r"}])[1] == []


@pytest.mark.parametrize("key", ["image", "image_url", "attachments", "file"])
def test_a_picture_at_a_place_that_is_not_read_is_refused(key: str) -> None:
    with pytest.raises(ServingError, match=key):
        parse(messages=[{**USER, key: URL}])


def test_strings_and_parts_without_a_type_are_read_in_their_order(serve) -> None:
    served = serve()

    plain = served.chat([{"type": "text", "text": "one"}, image_part(), {"type": "text", "text": "two"}]).json()
    short = served.chat(["one", {"image_url": image_part()["image_url"]}, {"text": "two"}]).json()

    assert short["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
    assert short["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert short["usage"]["prompt_tokens_details"]["image_tokens"] == 4
