"""huggingface_hub: InferenceClient, which sends the nulls of its fields."""

from __future__ import annotations

from typing import Any

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
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

client = InferenceClient(base_url=BASE_URL, api_key=KEY)
TOOLS: Any = [{"type": "function", "function": {"name": TOOL, "description": TOOL_TEXT, "parameters": TOOL_SCHEMA}}]


def asking(text: str = QUESTION) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def ask(messages: list[Any], **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **fields).choices[0].message


def picture() -> None:
    blue(ask(asking()).content)


def stream() -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=asking(), stream=True)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    many(pieces)
    blue("".join(pieces))


def tools() -> None:
    messages = asking(TOOL_QUESTION)
    message = ask(messages, tools=TOOLS, tool_choice={"type": "function", "function": {"name": TOOL}})
    counted(message.tool_calls[0].function.arguments)
    messages.append(message)
    messages += [{"role": "tool", "tool_call_id": call.id, "content": TOOL_RESULT} for call in message.tool_calls]
    assert ask(messages, tools=TOOLS).content


def schema() -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "seen", "schema": ANSWER_SCHEMA, "strict": True}}
    seen(ask(asking(), response_format=format_).content)


def error() -> None:
    try:
        client.chat.completions.create(model=NO_MODEL, messages=asking())
    except HfHubHTTPError as given:
        assert given.response.status_code == 404
        return says_which_model(Exception(given.response.text))
    raise AssertionError("no error")


def abort() -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=asking(), stream=True, extra_body=ENDLESS)
    next(iter(chunks))
    chunks.close()
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    messages += [ask(messages), *asking(SECOND)]
    assert ask(messages).content


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
