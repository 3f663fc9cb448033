"""litellm: two turns with its own messages sent back, and its bridge that turns Anthropic's messages into OpenAI's."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
from trial import (
    ANSWER_SCHEMA,
    BASE_URL,
    DATA_URL,
    ENDLESS,
    KEY,
    MODEL,
    NO_MODEL,
    PICTURE,
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

WHERE: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "num_retries": 0}
TOOLS = [{"type": "function", "function": {"name": TOOL, "description": TOOL_TEXT, "parameters": TOOL_SCHEMA}}]


def asking(text: str = QUESTION) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def ask(messages: list[Any], **fields: Any) -> Any:
    return litellm.completion(**WHERE, messages=messages, **fields).choices[0].message


def picture() -> None:
    blue(ask(asking()).content)


def stream() -> None:
    chunks = litellm.completion(**WHERE, messages=asking(), stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
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
    format_ = {"type": "json_schema", "json_schema": {"name": "seen", "schema": ANSWER_SCHEMA, "strict": True}}
    seen(ask(asking(), response_format=format_).content)


def error() -> None:
    try:
        litellm.completion(**{**WHERE, "model": f"openai/{NO_MODEL}"}, messages=asking())
    except litellm.NotFoundError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    chunks = litellm.completion(**WHERE, messages=asking(), stream=True, extra_body=ENDLESS)
    next(iter(chunks))
    chunks.completion_stream.close()
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    messages += [ask(messages).model_dump(), *asking(SECOND)]
    assert ask(messages).content


def bridge() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]}]
    answer: Any = asyncio.run(litellm.anthropic_messages(**WHERE, messages=messages, max_tokens=300))
    blue("".join(block.get("text", "") for block in answer["content"]))


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn, anthropic_bridge=bridge)
