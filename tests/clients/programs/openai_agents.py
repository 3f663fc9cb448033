"""openai-agents: its default class (responses), with a session's items sent back, and its class for chat completions."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)  # fmt: skip
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
    blue,
    comes_to_rest,
    many,
    report,
    says_which_model,
    seen,
)  # fmt: skip

set_tracing_disabled(True)
called: list[str] = []


def client() -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)


def agent(name: str = MODEL, **fields: Any) -> Agent:
    return Agent(name="Looker", model=OpenAIResponsesModel(name, client()), **fields)


class Seen(BaseModel):
    color: Literal["red", "blue", "green"]
    large: bool


@function_tool
def count_objects(color: Literal["red", "blue", "green"], shape: Literal["circle", "star", "square"]) -> str:
    """Count the objects of one color and shape."""
    called.append(f"{color} {shape}")
    return TOOL_RESULT


def asking(text: str = QUESTION) -> list[Any]:
    parts = [{"type": "input_image", "image_url": DATA_URL, "detail": "auto"}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def run(who: Agent, items: list[Any]) -> Any:
    return asyncio.run(Runner.run(who, items))


def picture() -> None:
    blue(run(agent(instructions="Answer briefly."), asking()).final_output)
    chat = Agent(name="Looker", model=OpenAIChatCompletionsModel(MODEL, client()))
    blue(run(chat, [{"role": "user", "content": asking()[0]["content"]}]).final_output)


def stream() -> None:
    async def streamed() -> list[str]:
        result = Runner.run_streamed(agent(), asking())
        events = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
        return [event.delta for event in events if event.type == "response.output_text.delta"]

    pieces = asyncio.run(streamed())
    many(pieces)
    blue("".join(pieces))


def tools() -> None:
    """The call is forced; the SDK itself lets the model choose again after it."""
    result = run(agent(tools=[count_objects], model_settings=ModelSettings(tool_choice=TOOL)), asking(TOOL_QUESTION))
    assert called and result.final_output


def schema() -> None:
    seen(run(agent(output_type=Seen), asking()).final_output.model_dump())


def error() -> None:
    try:
        run(agent(NO_MODEL), asking())
    except openai.NotFoundError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    async def leave() -> None:
        result = Runner.run_streamed(agent(model_settings=ModelSettings(extra_body=ENDLESS)), asking())
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type.endswith(".delta"):
                result.cancel()

    asyncio.run(leave())
    comes_to_rest()


def second_turn() -> None:
    assert run(agent(), [*run(agent(), asking()).to_input_list(), *asking(SECOND)]).final_output


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
