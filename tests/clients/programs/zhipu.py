"""zai-sdk (Zhipu's own). It strips the head of a data: URL, so the server gets bare base64."""

from __future__ import annotations

from typing import Any

import zai
from trial import (
    ANSWER_SCHEMA,
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

client = zai.ZaiClient(base_url=BASE_URL, api_key=KEY, max_retries=0)
TOOLS = [{"type": "function", "function": {"name": TOOL, "description": TOOL_TEXT, "parameters": TOOL_SCHEMA}}]


def asking(text: str = QUESTION) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def ask(messages: list[Any], **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **fields).choices[0].message


def picture() -> None:
    blue(ask(asking(), thinking={"type": "disabled"}, do_sample=False, request_id="trial-1", user_id="someone").content)


def stream() -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=asking(), stream=True, thinking={"type": "enabled"})
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    many(pieces)
    blue("".join(pieces))


def tools() -> None:
    messages = asking(TOOL_QUESTION)
    message = ask(messages, tools=TOOLS, tool_choice={"type": "function", "function": {"name": TOOL}})
    counted(message.tool_calls[0].function.arguments)
    messages.append(message.model_dump())
    messages += [{"role": "tool", "tool_call_id": call.id, "content": TOOL_RESULT} for call in message.tool_calls]
    assert ask(messages, tools=TOOLS).content


def schema() -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "seen", "schema": ANSWER_SCHEMA}}
    seen(ask(asking(), response_format=format_).content)


def error() -> None:
    try:
        client.chat.completions.create(model=NO_MODEL, messages=asking())
    except zai.core.APIStatusError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=asking(), stream=True, extra_body=ENDLESS)
    next(iter(chunks))
    chunks.response.close()
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    messages += [ask(messages).model_dump(), *asking(SECOND)]
    assert ask(messages).content


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
