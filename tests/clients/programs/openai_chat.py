"""openai (Python), chat completions; after `parse` the parsed message is sent back as it is."""

from __future__ import annotations

from typing import Any, Literal

import openai
from pydantic import BaseModel
from trial import (
    BASE_URL,
    DATA_URL,
    ENDLESS,
    KEY,
    MODEL,
    NO_MODEL,
    QUESTION,
    SECOND,
    TOOL,
    TOOL_QUESTION,
    TOOL_RESULT,
    TOOL_SCHEMA,
    TOOL_TEXT,
    blue,
    comes_to_rest,
    counted,
    many,
    report,
    says_which_model,
    seen,
)  # fmt: skip

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
TOOLS: Any = [{"type": "function", "function": {"name": TOOL, "description": TOOL_TEXT, "parameters": TOOL_SCHEMA}}]


class Seen(BaseModel):
    color: Literal["red", "blue", "green"]
    large: bool


def asking(text: str = QUESTION) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def picture() -> None:
    blue(client.chat.completions.create(model=MODEL, messages=asking()).choices[0].message.content)


def stream() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=asking(), stream_options={"include_usage": True}
    ) as events:
        pieces = [event.delta for event in events if event.type == "content.delta"]
        completion = events.get_final_completion()
    many(pieces)
    blue("".join(pieces))
    assert completion.choices[0].message.content == "".join(pieces)
    assert completion.usage and completion.usage.total_tokens > 0


def tools() -> None:
    messages = asking(TOOL_QUESTION)
    choice: Any = {"type": "function", "function": {"name": TOOL}}
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, tool_choice=choice)
    message = answer.choices[0].message
    assert message.tool_calls
    counted(message.tool_calls[0].function.arguments)
    messages.append(message)
    messages += [{"role": "tool", "tool_call_id": call.id, "content": TOOL_RESULT} for call in message.tool_calls]
    assert client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message.content


def schema() -> None:
    messages = asking()
    message = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Seen).choices[0].message
    assert isinstance(message.parsed, Seen)
    seen(message.content)
    messages += [message, *asking(SECOND)]
    assert client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content


def error() -> None:
    try:
        client.chat.completions.create(model=NO_MODEL, messages=asking())
    except openai.NotFoundError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    events = client.chat.completions.create(model=MODEL, messages=asking(), stream=True, extra_body=ENDLESS)
    next(iter(events))
    events.close()
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    messages += [client.chat.completions.create(model=MODEL, messages=messages).choices[0].message, *asking(SECOND)]
    assert client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
