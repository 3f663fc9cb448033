"""anthropic (Python): messages, their stream, thinking blocks sent back, and the count of tokens."""

from __future__ import annotations

from typing import Any

import anthropic
from trial import (
    ANSWER_SCHEMA,
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
    URL,
    blue,
    comes_to_rest,
    counted,
    many,
    report,
    says_which_model,
    seen,
)  # fmt: skip

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
TOOLS: Any = [{"name": TOOL, "description": TOOL_TEXT, "input_schema": TOOL_SCHEMA, "cache_control": {"type": "ephemeral"}}]
LIMIT = 300
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


def asking(text: str = QUESTION) -> list[Any]:
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": text}]}]


def said(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def picture() -> None:
    message = client.messages.create(
        model=MODEL, max_tokens=LIMIT, messages=asking(), metadata={"user_id": "someone"},
        system=[{"type": "text", "text": "Answer briefly.", "cache_control": {"type": "ephemeral"}}],
    )  # fmt: skip
    blue(said(message))
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0
    counted_tokens = client.messages.count_tokens(model=MODEL, messages=asking()).input_tokens
    plain = client.messages.create(model=MODEL, max_tokens=LIMIT, messages=asking())
    assert counted_tokens == plain.usage.input_tokens + (plain.usage.cache_read_input_tokens or 0)


def stream() -> None:
    with client.messages.stream(model=MODEL, max_tokens=LIMIT, messages=asking(), thinking=THINKING) as events:
        pieces = [event.delta.text for event in events if event.type == "content_block_delta" and event.delta.type == "text_delta"]
        message = events.get_final_message()
    many(pieces)
    blue("".join(pieces))
    assert [block.type for block in message.content] == ["thinking", "text"] and message.stop_reason == "end_turn"


def tools() -> None:
    messages = asking(TOOL_QUESTION)
    forced: Any = {"type": "tool", "name": TOOL, "disable_parallel_tool_use": True}
    message = client.messages.create(model=MODEL, max_tokens=LIMIT, messages=messages, tools=TOOLS, tool_choice=forced)
    [call] = [block for block in message.content if block.type == "tool_use"]
    counted(call.input)
    assert message.stop_reason == "tool_use"
    results = [{"type": "text", "text": TOOL_RESULT}]
    messages.append({"role": "assistant", "content": message.content})
    messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": results}]})
    assert said(client.messages.create(model=MODEL, max_tokens=LIMIT, messages=messages, tools=TOOLS))
    with client.messages.stream(model=MODEL, max_tokens=LIMIT, messages=asking(), tools=TOOLS, tool_choice=forced) as events:
        counted(events.get_final_message().content[-1].input)


def schema() -> None:
    format_: Any = {"format": {"type": "json_schema", "schema": ANSWER_SCHEMA}}
    seen(said(client.messages.create(model=MODEL, max_tokens=LIMIT, messages=asking(), output_config=format_)))


def error() -> None:
    try:
        client.messages.create(model=NO_MODEL, max_tokens=LIMIT, messages=asking())
    except anthropic.NotFoundError as given:
        assert given.body["error"]["type"] == "not_found_error" and given.body["type"] == "error"
        says_which_model(given)
    try:
        anthropic.Anthropic(base_url=URL, api_key="wrong", max_retries=0).messages.create(
            model=MODEL, max_tokens=LIMIT, messages=asking()
        )
    except anthropic.AuthenticationError as given:
        assert given.body["error"]["type"] == "authentication_error"
        return
    raise AssertionError("no error")


def abort() -> None:
    events = client.messages.create(model=MODEL, max_tokens=4000, messages=asking(), stream=True, extra_body=ENDLESS)
    for event in events:
        if event.type == "content_block_delta":
            break
    events.close()
    comes_to_rest()


def second_turn() -> None:
    messages = asking()
    first = client.messages.create(model=MODEL, max_tokens=LIMIT, messages=messages, thinking=THINKING)
    assert first.content[0].type == "thinking"
    messages += [{"role": "assistant", "content": first.content}, *asking(SECOND)]
    assert said(client.messages.create(model=MODEL, max_tokens=LIMIT, messages=messages, thinking=THINKING))


report(picture=picture, stream=stream, tools=tools, schema=schema, error=error, abort=abort, second_turn=second_turn)
