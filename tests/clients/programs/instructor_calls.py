"""instructor: typed answers through tools, a JSON schema and JSON mode; whole and as partial objects."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel
from trial import (
    BASE_URL,
    DATA_URL,
    KEY,
    MODEL,
    NO_MODEL,
    QUESTION,
    SECOND,
    TOOL_QUESTION,
    TOOL_RESULT,
    comes_to_rest,
    counted,
    many,
    report,
    says_which_model,
    seen,
)  # fmt: skip

plain = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
by_tools = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
by_schema = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)


class Seen(BaseModel):
    color: Literal["red", "blue", "green"]
    large: bool


class Count(BaseModel):
    """Count the objects of one color and shape."""

    color: Literal["red", "blue", "green"]
    shape: Literal["circle", "star", "square"]


def asking(text: str = QUESTION) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def picture() -> None:
    seen(by_tools.chat.completions.create(model=MODEL, messages=asking(), response_model=Seen).model_dump())


def stream() -> None:
    parts = list(by_schema.chat.completions.create_partial(model=MODEL, messages=asking(), response_model=Seen))
    many(parts)
    seen(parts[-1].model_dump())


def tools() -> None:
    messages = asking(TOOL_QUESTION)
    value, completion = by_tools.chat.completions.create_with_completion(model=MODEL, messages=messages, response_model=Count)
    counted(value.model_dump())
    message = completion.choices[0].message
    messages.append(message.model_dump())
    messages += [{"role": "tool", "tool_call_id": call.id, "content": TOOL_RESULT} for call in message.tool_calls]
    seen(by_tools.chat.completions.create(model=MODEL, messages=messages, response_model=Seen).model_dump())


def schema() -> None:
    seen(by_schema.chat.completions.create(model=MODEL, messages=asking(), response_model=Seen).model_dump())


def error() -> None:
    try:
        by_tools.chat.completions.create(model=NO_MODEL, messages=asking(), response_model=Seen, max_retries=0)
    except Exception as given:  # instructor wraps it in an exception of its own
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    """With a schema an answer ends; the connection is closed after its first piece."""
    parts = iter(by_schema.chat.completions.create_partial(model=MODEL, messages=asking(), response_model=Seen))
    next(parts)
    del parts
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    _, completion = by_schema.chat.completions.create_with_completion(model=MODEL, messages=messages, response_model=Seen)
    messages += [completion.choices[0].message.model_dump(), *asking(SECOND)]
    seen(by_schema.chat.completions.create(model=MODEL, messages=messages, response_model=Seen).model_dump())


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
