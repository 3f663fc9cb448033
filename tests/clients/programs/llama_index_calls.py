"""llama-index: OpenAILike as a chat model, and its default, which uses text completions."""

import gc
from typing import Any, Literal

import openai
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.llms import MessageRole
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from trial import (
    BASE_URL,
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
    TOOL_TEXT,
    blue,
    comes_to_rest,
    counted,
    many,
    report,
    says_which_model,
    seen,
)  # fmt: skip

WHERE: dict[str, Any] = {"api_base": BASE_URL, "api_key": KEY, "max_retries": 0, "context_window": 4096}
CHAT: dict[str, Any] = {**WHERE, "is_chat_model": True, "is_function_calling_model": True}
llm = OpenAILike(model=MODEL, **CHAT)


class Seen(BaseModel):
    color: Literal["red", "blue", "green"]
    large: bool


def count_objects(color: Literal["red", "blue", "green"], shape: Literal["circle", "star", "square"]) -> str:
    return TOOL_RESULT


def asking(text: str = QUESTION) -> list[ChatMessage]:
    picture = ImageBlock(image=PICTURE.encode(), image_mimetype="image/png")
    return [ChatMessage(role=MessageRole.USER, blocks=[picture, TextBlock(text=text)])]


def picture() -> None:
    blue(llm.chat(asking()).message.content)


def stream() -> None:
    pieces = [part.delta for part in llm.stream_chat(asking()) if part.delta]
    many(pieces)
    blue("".join(pieces))


def tools() -> None:
    tool = FunctionTool.from_defaults(count_objects, name=TOOL, description=TOOL_TEXT)
    messages = asking(TOOL_QUESTION)
    answer = llm.chat_with_tools([tool], chat_history=messages, tool_required=True)
    [call, *_] = llm.get_tool_calls_from_response(answer)
    counted(call.tool_kwargs)
    result = ChatMessage(role=MessageRole.TOOL, content=TOOL_RESULT, additional_kwargs={"tool_call_id": call.tool_id})
    assert llm.chat_with_tools([tool], chat_history=[*messages, answer.message, result], tool_choice="none").message.content


def schema() -> None:
    seen(llm.as_structured_llm(Seen).chat(asking()).raw.model_dump())


def error() -> None:
    try:
        OpenAILike(model=NO_MODEL, **CHAT).chat(asking())
    except openai.NotFoundError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    parts = OpenAILike(model=MODEL, **CHAT, additional_kwargs={"extra_body": ENDLESS}).stream_chat(asking())
    next(parts)
    parts.close()
    del parts
    gc.collect()  # it leaves closing the connection to the garbage collector
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    assert llm.chat([*messages, llm.chat(messages).message, *asking(SECOND)]).message.content


def text() -> None:
    default = OpenAILike(model=MODEL, **WHERE, max_tokens=16)
    assert default.complete("The star is").raw
    assert list(default.stream_complete("The star is"))


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn, text=text)
