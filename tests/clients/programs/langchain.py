"""langchain-openai: ChatOpenAI with bound tools and structured output."""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
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

WHERE: dict[str, Any] = {"base_url": BASE_URL, "api_key": KEY, "max_retries": 0}
llm = ChatOpenAI(model=MODEL, **WHERE)
TOOLS = [{"type": "function", "function": {"name": TOOL, "description": TOOL_TEXT, "parameters": TOOL_SCHEMA}}]


def asking(text: str = QUESTION) -> list[Any]:
    return [HumanMessage([{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": text}])]


def picture() -> None:
    blue(llm.invoke(asking()).text)


def stream() -> None:
    pieces = [chunk.text for chunk in llm.stream(asking()) if chunk.text]
    many(pieces)
    blue("".join(pieces))


def tools() -> None:
    messages = asking(TOOL_QUESTION)
    message = llm.bind_tools(TOOLS, tool_choice=TOOL).invoke(messages)
    counted(message.tool_calls[0]["args"])
    results = [ToolMessage(TOOL_RESULT, tool_call_id=call["id"]) for call in message.tool_calls]
    assert llm.bind_tools(TOOLS).invoke([*messages, message, *results]).text


def schema() -> None:
    seen(llm.with_structured_output({"title": "seen", **ANSWER_SCHEMA}, method="json_schema").invoke(asking()))
    seen(llm.with_structured_output({"title": "seen", **ANSWER_SCHEMA}, method="function_calling").invoke(asking()))


def error() -> None:
    try:
        ChatOpenAI(model=NO_MODEL, **WHERE).invoke(asking())
    except openai.NotFoundError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    chunks = ChatOpenAI(model=MODEL, **WHERE, extra_body=ENDLESS).stream(asking())
    next(chunks)
    chunks.close()
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    assert llm.invoke([*messages, llm.invoke(messages), *asking(SECOND)]).text


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
