"""pydantic-ai: an agent with a tool, and typed output through a tool and through a schema."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ModelHTTPError, NativeOutput, RunContext, ToolDefinition, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from trial import (
    BASE_URL,
    ENDLESS,
    KEY,
    MODEL,
    NO_MODEL,
    PICTURE,
    QUESTION,
    SECOND,
    TOOL_QUESTION,
    TOOL_RESULT,
    blue,
    comes_to_rest,
    many,
    report,
    says_which_model,
    seen,
)  # fmt: skip


def model(name: str = MODEL) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY))


class Seen(BaseModel):
    color: Literal["red", "blue", "green"]
    large: bool


def asking(text: str = QUESTION) -> list[Any]:
    return [BinaryContent(base64.b64decode(PICTURE), media_type="image/png"), text]


def picture() -> None:
    blue(Agent(model()).run_sync(asking()).output)


def stream() -> None:
    async def streamed() -> list[str]:
        async with Agent(model()).run_stream(asking()) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    pieces = asyncio.run(streamed())
    many(pieces)
    blue("".join(pieces))


def tools() -> None:
    """Every turn must call a tool, so the answer comes by one too; the tool is offered until it has been called."""
    given: list[str] = []

    async def until_called(context: RunContext[None], tool: ToolDefinition) -> ToolDefinition | None:
        return None if given else tool

    agent = Agent(model(), output_type=ToolOutput(Seen), retries=3)

    @agent.tool_plain(prepare=until_called)
    def count_objects(color: Literal["red", "blue", "green"], shape: Literal["circle", "star", "square"]) -> str:
        """Count the objects of one color and shape."""
        given.append(f"{color} {shape}")
        return TOOL_RESULT

    result = agent.run_sync(asking(TOOL_QUESTION))
    seen(result.output.model_dump())
    assert given, "the tool is called"


def schema() -> None:
    seen(Agent(model(), output_type=NativeOutput(Seen)).run_sync(asking()).output.model_dump())


def error() -> None:
    try:
        Agent(model(NO_MODEL)).run_sync(asking())
    except ModelHTTPError as given:
        assert given.status_code == 404
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    async def leave() -> None:
        async with Agent(model()).run_stream(asking(), model_settings={"extra_body": ENDLESS}) as result:
            async for _ in result.stream_text(delta=True, debounce_by=None):
                raise InterruptedError

    try:
        asyncio.run(leave())
    except InterruptedError:
        comes_to_rest()


def second_turn() -> None:
    agent = Agent(model())
    assert agent.run_sync(asking(SECOND), message_history=agent.run_sync(asking()).all_messages()).output


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
