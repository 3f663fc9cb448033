"""OpenAI's newer words for the same questions (POST /v1/responses), translated onto chat completions and back.

Nothing is stored, so a conversation is sent whole each time: `previous_response_id` is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from api.completion import Chunk, Completion
from api.errors import ServingError, invalid
from api.schemas import HARMLESS, ChatRequest, check_agreement, known_fields
from api.validation import Strict, check, parse_object, shown
from api.words import Said


class Part(Strict):
    type: Literal["input_text", "output_text", "input_image"]
    text: str | None = None
    image_url: str | None = None
    detail: str | None = None  # harmless, as in chat completions
    annotations: Any = None
    logprobs: Any = None


class ReasoningPart(Strict):
    type: Literal["reasoning_text"]
    text: str


class Item(Strict):
    """A message, a call, its result, or thoughts; answers can be sent back as they came."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part | ReasoningPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Any] | None = None
    encrypted_content: None = None


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ReasoningOptions(Strict):
    effort: str | None = None
    summary: str | None = None  # harmless: thoughts are told whole


class TextOptions(Strict):
    format: dict[str, Any] | None = None


class ResponseRequest(Strict):
    input: Annotated[
        Annotated[str, Tag("#string")] | Annotated[list[Item], Tag("#list")],
        Discriminator(
            lambda given: {str: "#string", list: "#list"}.get(type(given)),
            custom_error_type="input",
            custom_error_message="must be a string or a list of items",
        ),
    ]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


# How a field of the chat is called here.
_NAMES = (
    (r"max_tokens", "max_output_tokens"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"image_url\.url", "image_url"),
)


class Translation:
    """One request's way into a chat, and the names under which its mistakes are told."""

    def __init__(self) -> None:
        self.asked = ResponseRequest(input="")
        self._origins: list[str] = []  # of each message: the field it came from

    def parse(self, body: bytes) -> ChatRequest:
        """Raises the 400 error that names the field of this request."""
        data = {name: value for name, value in parse_object(body).items() if name not in HARMLESS}
        for name, value in data.items():
            if name not in ResponseRequest.model_fields and value is not None:
                raise invalid(f"`{name}` is not supported.", name, "unsupported_parameter")
        self.asked = check(ResponseRequest, {k: v for k, v in data.items() if k in ResponseRequest.model_fields})
        chat = check(ChatRequest, known_fields(self._fields()))
        check_agreement(chat)
        return chat

    def words(self, chat: ChatRequest, completion: Completion) -> ResponseWords:
        return ResponseWords(self.asked, completion)

    def renamed(self, error: ServingError) -> ServingError:
        message, param = error.message, error.param or ""
        if origin := re.match(r"messages\[(\d+)\]", param):
            names = [(re.escape(origin[0]), self._origins[int(origin[1])]), *_NAMES]
        else:
            names = [(r"^messages$", "input"), (r"`messages`", "`input`"), *_NAMES]
        for old, new in names:
            message, param = re.sub(old, new, message), re.sub(old, new, param)
        return ServingError(error.status, message, error.type, error.code, param or None, error.retry_after_s)

    def _fields(self) -> dict[str, Any]:
        asked = self.asked
        fields: dict[str, Any] = {"messages": self._messages(), "max_tokens": asked.max_output_tokens}
        for name in ("model", "temperature", "top_p", "stream", "parallel_tool_calls"):
            fields[name] = getattr(asked, name)
        if asked.reasoning:
            fields["reasoning_effort"] = asked.reasoning.effort
        if asked.text and asked.text.format:
            fields["response_format"] = _format(asked.text.format)
        if asked.tools is not None:
            fields["tools"] = [{"type": "function", "function": t.model_dump(exclude={"type"})} for t in asked.tools]
        fields["tool_choice"] = asked.tool_choice
        if isinstance(asked.tool_choice, dict) and "name" in asked.tool_choice:
            kind = {k: v for k, v in asked.tool_choice.items() if k != "name"}
            fields["tool_choice"] = {**kind, "function": {"name": asked.tool_choice["name"]}}
        return {name: value for name, value in fields.items() if value is not None}

    def _messages(self) -> list[dict[str, Any]]:
        """One message for each turn: thoughts, text and calls of an assistant that follow each other are one."""
        messages: list[dict[str, Any]] = []
        if self.asked.instructions:
            self._origins.append("instructions")
            messages.append({"role": "system", "content": self.asked.instructions})
        items = self.asked.input
        for number, item in enumerate([Item(role="user", content=items)] if isinstance(items, str) else items):
            field = "input" if isinstance(items, str) else f"input[{number}]"
            message = _message(item, field)
            last = messages[-1] if messages else {}
            if message["role"] == last.get("role") == "assistant" and not (message["content"] and last["content"]):
                last["content"] = last["content"] or message["content"]
                for name in ("reasoning_content", "tool_calls"):
                    if name in message:
                        last[name] = last[name] + message[name] if name in last else message[name]
                continue
            self._origins.append(field)
            messages.append(message)
        return messages


def _message(item: Item, field: str) -> dict[str, Any]:
    needed = {"message": ("role", "content"), "function_call": ("name", "arguments"),
              "function_call_output": ("call_id", "output"), "reasoning": ()}  # fmt: skip
    for name in needed[item.type]:
        if getattr(item, name) is None:
            raise invalid(f"`{field}.{name}` is required.", f"{field}.{name}", "missing_required_parameter")
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": item.call_id, "function": function}]}
    if item.type == "function_call_output":
        return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output, f"{field}.output")}
    if item.type == "reasoning":
        parts = item.content if isinstance(item.content, list) else []
        return {"role": "assistant", "content": "", "reasoning_content": "\n".join(part.text or "" for part in parts)}
    return {"role": item.role, "content": _content(item.content, f"{field}.content")}


def _content(content: Any, field: str) -> Any:
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        wanted = "image_url" if part.type == "input_image" else "text"
        if getattr(part, wanted, None) is None:
            name = f"{field}[{number}].{wanted}"
            raise invalid(f"`{name}` is required.", name, "missing_required_parameter")
        image = {"type": "image_url", "image_url": {"url": getattr(part, "image_url", None)}}
        parts.append(image if wanted == "image_url" else {"type": "text", "text": part.text})
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _format(asked: dict[str, Any]) -> dict[str, Any]:
    if asked.get("type") != "json_schema":
        if asked.get("type") not in ("text", "json_object"):
            words = "'text', 'json_object', 'json_schema'"
            message = f"`text.format.type` must be one of {words}. Given: {shown(asked.get('type'))}"
            raise invalid(message, "text.format.type")
        return asked
    return {"type": "json_schema", "json_schema": {name: value for name, value in asked.items() if name != "type"}}


class ResponseWords:
    """Items of the output, each opened, filled and closed in its turn."""

    def __init__(self, asked: ResponseRequest, completion: Completion) -> None:
        self._asked = asked
        self._completion = completion
        self._output: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._sent = 0

    def opening(self) -> list[Said]:
        return [self._event("created", response=self.body()), self._event("in_progress", response=self.body())]

    def say(self, chunk: Chunk) -> list[Said]:
        delta = chunk["choices"][0]["delta"]
        said: list[Said] = []
        if text := delta.get("reasoning"):
            said += self._text("reasoning", text)
        if text := delta.get("content"):
            said += self._text("message", text)
        self._boxes += delta.get("boxes", [])
        for call in delta.get("tool_calls", []):
            said += self._call(call)
        return said

    def closing(self) -> list[Said]:
        said = self._close()
        if not any(item["type"] != "reasoning" for item in self._output):
            said += [*self._text("message", ""), *self._close()]
        return [*said, self._event("completed" if self._status == "completed" else "incomplete", response=self.body())]

    def failed(self, error: ServingError) -> Said:
        words = error.body()["error"]
        # OpenAI's client raises on `error`; others read the fields beside it.
        return "error", {**words, "type": "error", "error": words, "sequence_number": self._sent}

    def body(self) -> dict[str, Any]:
        completion, asked = self._completion, self._asked
        done = completion.finished
        tokens = completion.usage() if done else None
        incomplete = None
        if self._status == "incomplete":
            reason = completion.choices[0].finish_reason
            incomplete = {"reason": "max_output_tokens" if reason == "length" else reason}
        return {
            "id": f"resp_{completion.id}", "object": "response", "created_at": completion.created,
            "status": self._status, "model": completion.model, "request_id": completion.request_id,
            "error": None, "incomplete_details": incomplete, "instructions": asked.instructions, "metadata": {},
            "max_output_tokens": asked.max_output_tokens, "temperature": asked.temperature, "top_p": asked.top_p,
            "parallel_tool_calls": asked.parallel_tool_calls is not False, "tool_choice": asked.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or []], "store": False,
            "output": list(self._output),
            **({"boxes": self._boxes} if self._boxes else {}),
            "usage": tokens and {
                "input_tokens": tokens["prompt_tokens"],
                "input_tokens_details": tokens["prompt_tokens_details"],
                "output_tokens": tokens["completion_tokens"],
                "output_tokens_details": tokens["completion_tokens_details"],
                "total_tokens": tokens["total_tokens"],
            },
            **({"timings": completion.timings()} if done else {}),
        }  # fmt: skip

    @property
    def _status(self) -> str:
        if not self._completion.finished:
            return "in_progress"
        return "completed" if self._completion.choices[0].finish_reason in ("stop", "tool_calls") else "incomplete"

    def _text(self, kind: str, text: str) -> Iterator[Said]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            part = _part(kind, "")
            item: dict[str, Any] = {"type": kind, "id": self._id(kind), "status": "in_progress", "content": [part]}
            name, value = ("role", "assistant") if kind == "message" else ("summary", [])
            item[name] = value
            self._open = item
            self._output.append(item)
            yield self._of_item("output_item.added", item={**item, "content": []})
            yield self._of_part("content_part.added", part=dict(part))
        self._open["content"][0]["text"] += text
        if text:
            logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            yield self._of_part(f"{_part(kind, '')['type']}.delta", delta=text, **logprobs)

    def _call(self, call: dict[str, Any]) -> Iterator[Said]:
        yield from self._close()
        function = call["function"]
        item = {
            "type": "function_call",
            "id": self._id("call"),
            "status": "in_progress",
            "call_id": call["id"],
            **function,
        }
        self._output.append(item)
        arguments, place = function["arguments"], {"item_id": item["id"]}
        yield self._of_item("output_item.added", item={**item, "arguments": ""})
        yield self._of_item("function_call_arguments.delta", **place, delta=arguments)
        yield self._of_item("function_call_arguments.done", **place, name=function["name"], arguments=arguments)
        item["status"] = "completed"
        yield self._of_item("output_item.done", item=dict(item))

    def _close(self) -> list[Said]:
        item = self._open
        if item is None:
            return []
        item["status"] = "completed" if self._status == "in_progress" else self._status
        part = item["content"][0]
        logprobs: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        said = [
            self._of_part(f"{part['type']}.done", text=part["text"], **logprobs),
            self._of_part("content_part.done", part=dict(part)),
            self._of_item("output_item.done", item=dict(item)),
        ]
        self._open = None
        return said

    def _id(self, kind: str) -> str:
        head = {"message": "msg", "reasoning": "rs", "call": "fc"}[kind]
        return f"{head}_{self._completion.id}_{len(self._output)}"

    def _of_part(self, name: str, /, **data: Any) -> Said:
        return self._of_item(name, item_id=self._output[-1]["id"], content_index=0, **data)

    def _of_item(self, name: str, /, **data: Any) -> Said:
        return self._event(name, output_index=len(self._output) - 1, **data)

    def _event(self, name: str, /, **data: Any) -> Said:
        self._sent += 1
        return f"response.{name}", {"type": f"response.{name}", "sequence_number": self._sent - 1, **data}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
