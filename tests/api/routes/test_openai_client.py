"""OpenAI's own client against the running server: whole, streamed, async, structured, tools, and errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from served import KEY, image_part, text_part

MESSAGES: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"color": {"type": "string"}, "limit": {"type": "integer"}},
            "required": ["color", "limit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CALL = (
    "<tool_call>count\n<arg_key>color</arg_key>\n<arg_value>3</arg_value>\n"
    "<arg_key>limit</arg_key>\n<arg_value>4</arg_value>\n</tool_call>"
)


class Person(BaseModel):
    name: str
    age: int


def client_of(server: Any, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_answers_streams_models_and_errors(start) -> None:
    server = start()
    client = client_of(server)

    whole = client.chat.completions.create(model="fake", messages=MESSAGES)
    with client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    with client.chat.completions.stream(
        model="fake", messages=MESSAGES, stream_options={"include_usage": True}
    ) as events:
        final = events.get_final_completion()
    again = client.chat.completions.create(model="fake", messages=[*MESSAGES, whole.choices[0].message, *MESSAGES])

    assert whole.choices[0].message.content == streamed == "I see 0 pictures. hello"
    assert final.choices[0].message.content == streamed
    assert final.usage is not None and whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens > 0
    assert again.usage is not None and again.usage.prompt_tokens > 16
    assert [model.id for model in client.models.list()] == ["fake"] and client.models.retrieve("fake").id == "fake"
    assert whole._request_id == whole.model_extra["request_id"]  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match=r"`temperature` must be <= 100\. Given: 101") as wrong:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=101)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.APIError, match="The model failed on this request"):
        list(client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "FAIL"}], stream=True))
    with pytest.raises(openai.AuthenticationError):
        client_of(server, "wrong").models.list()


def test_all_fields_of_a_request_at_once(start) -> None:
    client = client_of(start())
    content: Any = [image_part(), text_part("what?")]

    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": content}], n=2, seed=5, temperature=0.5, top_p=0.9,
        presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"5": -1}, logprobs=True, top_logprobs=2, max_tokens=9,
        stop=["zzz"], user="u", metadata={"a": "b"}, reasoning_effort="low", store=True,
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": True}},
    )  # fmt: skip

    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.content and choice.logprobs is not None for choice in answer.choices)
    assert answer.usage is not None and answer.usage.completion_tokens == 18


def test_concurrent_asynchronous_requests(start) -> None:
    server = start()

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            whole = [client.chat.completions.create(model="fake", messages=MESSAGES) for _ in range(4)]
            answers = [answer.choices[0].message.content for answer in await asyncio.gather(*whole)]
            stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
            return [*answers, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])]

    assert asyncio.run(ask()) == ["I see 0 pictures. hello"] * 5


def test_a_structured_answer_is_parsed(start) -> None:
    client = client_of(start(FAKE_ANSWER='<think>so</think>\n{"name": "A {b}", "age": 7}'))

    answer = client.chat.completions.parse(model="fake", messages=MESSAGES, response_format=Person)

    assert answer.choices[0].message.parsed == Person(name="A {b}", age=7)
    with client.chat.completions.stream(model="fake", messages=MESSAGES, response_format=Person) as events:
        assert events.get_final_completion().choices[0].message.parsed == Person(name="A {b}", age=7)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "count"}}])
def test_tools_are_called_with_typed_arguments(choice: Any, start) -> None:
    client = client_of(start(FAKE_ANSWER=CALL))

    whole = client.chat.completions.create(model="fake", messages=MESSAGES, tools=[TOOL], tool_choice=choice)
    with client.chat.completions.stream(model="fake", messages=MESSAGES, tools=[TOOL], tool_choice=choice) as events:
        streamed = events.get_final_completion()
    message = whole.choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": [image_part(), text_part("there")]}
    after = client.chat.completions.create(model="fake", messages=[*MESSAGES, message, result], tools=[TOOL])

    assert whole.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("count", {"color": "3", "limit": 4})
    [other] = streamed.choices[0].message.tool_calls or []
    assert other.function.arguments == call.function.arguments
    assert after.usage is not None and after.usage.prompt_tokens_details is not None
    assert after.usage.prompt_tokens_details.to_dict()["image_tokens"] == 4
