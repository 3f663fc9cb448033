"""openai (Python), responses; output items are sent back as `model_dump` gives them, nulls and all."""

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
TOOLS: Any = [{"type": "function", "name": TOOL, "description": TOOL_TEXT, "parameters": TOOL_SCHEMA, "strict": True}]


class Seen(BaseModel):
    color: Literal["red", "blue", "green"]
    large: bool


def asking(text: str = QUESTION) -> list[Any]:
    parts = [{"type": "input_image", "image_url": DATA_URL, "detail": "auto"}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def picture() -> None:
    blue(client.responses.create(model=MODEL, input=asking()).output_text)


def stream() -> None:
    with client.responses.stream(model=MODEL, input=asking()) as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    many(pieces)
    blue("".join(pieces))
    assert final.output_text == "".join(pieces) and final.usage


def tools() -> None:
    items = asking(TOOL_QUESTION)
    answer = client.responses.create(
        model=MODEL, input=items, tools=TOOLS, tool_choice={"type": "function", "name": TOOL},
        include=["reasoning.encrypted_content"], truncation="disabled", background=False, store=False,
    )  # fmt: skip
    calls = [item for item in answer.output if item.type == "function_call"]
    assert calls
    counted(calls[0].arguments)
    items += [item.model_dump() for item in answer.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": TOOL_RESULT} for call in calls]
    assert client.responses.create(model=MODEL, input=items, tools=TOOLS).output_text


def schema() -> None:
    answer = client.responses.parse(model=MODEL, input=asking(), text_format=Seen)
    assert isinstance(answer.output_parsed, Seen)
    seen(answer.output_text)


def error() -> None:
    try:
        client.responses.create(model=NO_MODEL, input=asking())
    except openai.NotFoundError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    events = client.responses.create(model=MODEL, input=asking(), stream=True, extra_body=ENDLESS)
    for event in events:
        if event.type.endswith(".delta"):
            break
    events.close()
    comes_to_rest()


def second_turn() -> None:
    items = asking()
    items += [*(item.model_dump() for item in client.responses.create(model=MODEL, input=items).output), *asking(SECOND)]
    assert client.responses.create(model=MODEL, input=items).output_text
    assert client.responses.input_tokens.count(model=MODEL, input=items).input_tokens > 0


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
