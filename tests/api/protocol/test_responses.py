"""POST /v1/responses with OpenAI's own client: the same answers as chat completions, in the other format."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from served import KEY, image_part, sse_data

from api.engine.request import Request

IMAGE: Any = {"type": "input_image", "image_url": image_part()["image_url"]["url"]}
TOOL: Any = {
    "type": "function", "name": "count", "strict": True,
    "parameters": {"type": "object", "properties": {"limit": {"type": "integer"}}, "required": ["limit"],
                   "additionalProperties": False},
}  # fmt: skip
CALL = "<think>so</think><tool_call>count\n<arg_key>limit</arg_key>\n<arg_value>4</arg_value>\n</tool_call>"


class Person(BaseModel):
    name: str
    age: int


def client_of(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_answers_streams_and_errors(start) -> None:
    client = client_of(start())
    question: Any = [{"role": "user", "content": [IMAGE, {"type": "input_text", "text": "hello"}]}]

    whole = client.responses.create(model="fake", input=question, instructions="be short", max_output_tokens=50)
    with client.responses.stream(model="fake", input=question) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    short = client.responses.create(model="fake", input="hello", max_output_tokens=3)

    assert whole.output_text == streamed == final.output_text == "I see 1 pictures. hello"
    assert whole.status == final.status == "completed" and whole.usage is not None
    assert whole.usage.input_tokens > whole.usage.input_tokens_details.to_dict()["image_tokens"] == 4
    assert (short.status, short.output_text) == ("incomplete", "I s")
    assert short.incomplete_details is not None and short.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="`max_output_tokens` must be >= 1") as wrong:
        client.responses.create(model="fake", input="x", max_output_tokens=0)
    assert wrong.value.param == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="`previous_response_id` is not supported"):
        client.responses.create(model="fake", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.APIError, match="The model failed on this request"):
        list(client.responses.create(model="fake", input="FAIL", stream=True))


def test_tool_calls_reasoning_and_the_next_request(start) -> None:
    client = client_of(start(FAKE_ANSWER=CALL))

    answer = client.responses.create(model="fake", input="hello", tools=[TOOL], tool_choice="required")
    with client.responses.stream(model="fake", input="hello", tools=[TOOL]) as stream:
        streamed = stream.get_final_response()
    reasoning, call = answer.output
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": [IMAGE]}  # type: ignore[union-attr]
    again = client.responses.create(
        model="fake", input=[{"role": "user", "content": "hello"}, *answer.output, result], tools=[TOOL]
    )

    assert reasoning.type == "reasoning" and reasoning.content and reasoning.content[0].text == "so"
    assert call.type == "function_call" and (call.name, json.loads(call.arguments)) == ("count", {"limit": 4})
    assert [item.type for item in streamed.output] == ["reasoning", "function_call"]
    assert again.usage is not None and again.usage.input_tokens_details.to_dict()["image_tokens"] == 4


def test_a_structured_answer_is_parsed(start) -> None:
    client = client_of(start(FAKE_ANSWER='<think>so</think>{"name": "A", "age": 7}'))

    answer = client.responses.parse(model="fake", input="hello", text_format=Person, reasoning={"effort": "low"})

    assert answer.output_parsed == Person(name="A", age=7)


@pytest.mark.parametrize(
    "text",
    [CALL, "<think>a</think>one", "", "<think>never closed", "It is <|begin_of_box|>[[1,2,3,4]]<|end_of_box|>.",
     "<tool_call>count</tool_call> and then <think>more</think> words"],
)  # fmt: skip
def test_the_events_of_a_stream_add_up_to_the_whole(text: str, serve) -> None:
    served = serve(answer=lambda prompt, images: text)
    body = {"input": [{"role": "user", "content": [IMAGE]}], "tools": [{**TOOL, "strict": False}]}

    whole = served.client.post("/v1/responses", json=body).json()
    events = sse_data(served.client.post("/v1/responses", json={**body, "stream": True}).text)

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    streamed = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in final["output"]]
    assert streamed == [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in whole["output"]]
    assert final.get("boxes") == whole.get("boxes") and bool(whole.get("boxes")) == ("box" in text)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    for number, item in enumerate(final["output"]):
        deltas = [e["delta"] for e in events if e["type"].endswith(".delta") and e["output_index"] == number]
        assert "".join(deltas) == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_the_fields_reach_the_engine(serve) -> None:
    served = serve()
    requests: list[Request] = []
    submit = served.engine.submit
    served.engine.submit = lambda request, deliver: requests.append(request) or submit(request, deliver)

    answer = served.client.post("/v1/responses", json={
        "input": "hi", "model": "fake", "temperature": 0.5, "top_p": 0.4, "max_output_tokens": 7, "user": "me",
        "reasoning": {"effort": "low"}, "store": True, "metadata": {"a": "b"},
    })  # fmt: skip

    sampling = requests[0].sampling
    assert answer.status_code == 200
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.thinking_tokens) == (0.5, 0.4, 7, 512)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": 3}, "input", "a string or a list"),
        ({}, "input", "is required"),
        ({"input": []}, "input", ">= 1 items"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is required"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "is required"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url", "is required"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": [{**IMAGE, "image_url": "file:///x"}]}]},
         "input[1].content[0].image_url", "data: URL"),
        ({"input": "x", "temperature": -3}, "temperature", ">= 0"),
        ({"input": "x", "reasoning": {"effort": "huge"}}, "reasoning.effort", "huge"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "text.format", "enforced"),
        ({"input": "x", "tools": [{**TOOL, "name": "a b"}]}, "tools[0].name", "a b"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice", "no `tools`"),
        ({"input": "x", "background": True}, "background", "must be false"),
        ({"input": "x", "include": "all"}, "include", "a list"),
        ({"input": "x", "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]},
         "tools[0].tools[0].type", "function"),
        ({"input": "x" * 5000}, "input", "context length"),
        ({"input": "x", "model": "other"}, "model", "other"),
    ],
)  # fmt: skip
def test_errors_use_the_field_names_of_this_format(fields: dict[str, Any], param: str, words: str, serve) -> None:
    answer = serve().client.post("/v1/responses", json=fields)

    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and error["param"] == param
    assert words in error["message"] and "messages" not in error["message"] and "max_tokens" not in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "messages", "response_format"])
def test_a_field_of_another_format_is_refused_by_its_own_name(field: str, serve) -> None:
    fields = {"input": "x", "max_output_tokens": 9, "text": {"format": {"type": "text"}}, field: {"type": "text"}}

    error = serve().client.post("/v1/responses", json=fields).json()["error"]

    assert error["param"] == field and field in error["message"]


SPACE: Any = {"type": "namespace", "name": "shop", "description": "of a shop", "tools": [TOOL]}


def test_a_function_in_a_namespace_is_called_by_both_names(serve) -> None:
    served = serve(answer=lambda prompt, images: CALL.replace("count", "shop.count"))
    choice = {"type": "function", "name": "count", "namespace": "shop"}

    body = served.client.post("/v1/responses", json={"input": "x", "tools": [SPACE], "tool_choice": choice}).json()
    call = body["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "4"}
    items = [{"role": "user", "content": "x"}, *body["output"], result]
    again = served.client.post("/v1/responses", json={"input": items, "tools": [SPACE]})

    assert (call["type"], call["namespace"], call["name"]) == ("function_call", "shop", "count")
    assert again.status_code == 200, again.text


def test_what_clients_send_without_need_is_accepted_and_named(serve) -> None:
    fields = {
        "include": ["reasoning.encrypted_content"], "truncation": "auto", "background": False, "client_metadata": {"a": "b"},
        "stream_options": {"include_obfuscation": False}, "text": {"verbosity": "medium"}, "metadata": {"run": "1"},
        "max_tool_calls": 4, "top_k": 3, "seed": 1,
    }  # fmt: skip

    answer = serve().client.post("/v1/responses", json={"input": "hello", **fields})

    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert {"include[]", "truncation", "client_metadata", "max_tool_calls", "metadata"} <= set(body["ignored"])
    assert not {"top_k", "seed", "stream_options"} & set(body["ignored"]) and body["metadata"] == {"run": "1"}


def test_the_tokens_of_a_request_are_counted_without_an_answer(serve) -> None:
    served = serve()
    request = {"input": [{"role": "user", "content": [IMAGE, {"type": "input_text", "text": "hello"}]}]}

    count = served.client.post("/v1/responses/input_tokens", json=request).json()

    usage = served.client.post("/v1/responses", json=request).json()["usage"]
    assert count == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}


def test_null_and_notes_in_a_part_are_ignored(serve) -> None:
    part = {**IMAGE, "file_id": None, "detail": "auto", "cache_control": {"type": "ephemeral"}}

    answer = serve().client.post("/v1/responses", json={"input": [{"role": "user", "content": [part]}]})

    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["input_tokens_details"]["image_tokens"] == 4
    assert "input[].content[].cache_control" in answer.headers["x-glm-ignored"]
    assert "detail" not in answer.headers["x-glm-ignored"]


def test_detail_is_named(serve) -> None:
    body = {"input": [{"role": "user", "content": [{**IMAGE, "detail": "high"}]}]}

    assert serve().client.post("/v1/responses", json=body).headers["x-glm-ignored"] == "input[].content[].detail"


@pytest.mark.parametrize(
    ("part", "field", "given"),
    [
        ({**IMAGE, "file_id": "f"}, "file_id", "not supported"),
        ({**IMAGE, "detail": 7}, "detail", "Given: 7"),
        ({**IMAGE, "detail": "banana"}, "detail", 'Given: "banana"'),
        ({**IMAGE, "image_url": {"url": "x"}}, "image_url", 'Given: {"url": "x"}'),
        ({**IMAGE, "image_url": "data:image/png;base64,AAAA"}, "image_url", "must be a picture"),
        ({"type": "input_file", "file_id": "f"}, "type", 'Given: "input_file"'),
        ({"type": "input_text", "text": 5}, "text", "Given: 5"),
        ({"type": "input_text", "text": "a", "image_url": "b"}, "image_url", "does not belong"),
    ],
)
@pytest.mark.parametrize("place", ["content", "output"])
def test_a_mistake_in_a_part_is_refused_by_its_field(part: Any, field: str, given: str, place: str, serve) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "count", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": [part]}
    items = [{"role": "user", "content": "a"}, {"role": "user", "content": [part]}]

    answer = serve().client.post("/v1/responses", json={"input": items if place == "content" else [call, result]})

    error = answer.json()["error"]
    name = f"input[1].{place}[0].{field}"
    assert (answer.status_code, error["param"]) == (400, name), answer.text
    assert f"`{name}`" in error["message"] and given in error["message"]
