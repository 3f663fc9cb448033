"""Anthropic's messages (POST /v1/messages), translated into a chat request.

Blocks become messages of a chat: `tool_result` blocks its role `tool`, `tool_use` and `thinking` blocks parts of an
answer. Signatures of thinking blocks are not checked: the reasoning is read as it is sent.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from api.errors import ServingError, invalid
from api.protocol.body import parse_object, shown
from api.protocol.extensions import REASONING, SAMPLING, take
from api.protocol.fields import FieldRules, IgnoredFields, Strict, check
from api.protocol.schemas import ChatRequest, check_chat

HARMLESS = {
    "metadata": "for the caller's own use",
    "service_tier": "there is one tier",
    "cache_control": "prompts are cached by their content",
    "context_management": "nothing is cut out of a conversation",
    "inference_geo": "there is one place",
    "speed": "there is one speed",
    "anthropic_version": "there is one version",
    "anthropic_beta": "there is one version",
    "betas": "there is one version",
}
RULES = FieldRules(HARMLESS, echoed=frozenset({"messages", "system", "tools", "thinking", "output_config"}))
_PLACE = "place"  # of a picture while its block is translated: the field that it came in
_EFFORT = {"max": "xhigh"}  # a level that only Anthropic names


def _text_or(items: Any, what: str) -> Any:
    """A field that is a string or a list of objects."""
    return Annotated[
        Annotated[str, Tag("#string")] | Annotated[items, Tag("#list")],
        Discriminator(
            lambda given: "#string" if isinstance(given, str) else "#list" if isinstance(given, list) else None,
            custom_error_type="content",
            custom_error_message=f"must be a string or a list of {what}",
        ),
    ]


class Source(Strict):
    type: Literal["base64", "url", "text"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Block(Strict):
    type: Literal["text", "image", "document", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str | None = None
    source: Source | None = None
    title: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: _text_or(list[Block], "blocks") | None = None  # type: ignore[valid-type]
    is_error: bool | None = None
    thinking: str | None = None


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: _text_or(list[Block], "blocks")  # type: ignore[valid-type]


class Tool(Strict):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessagesRequest(Strict):
    messages: list[Turn] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    system: _text_or(list[Block], "blocks") | None = None  # type: ignore[valid-type]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="without it there is none")
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None


# Fields of the chat request, and their names in this format.
_NAMES = (
    (r"response_format\.json_schema", "output_config.format"),
    (r"response_format", "output_config.format"),
    (r"reasoning_effort", "output_config.effort"),
    (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"`stop`", "`stop_sequences`"),
    (r"^stop$", "stop_sequences"),
)


class MessagesTranslation:
    """Translates one request into a chat request, and the errors of the chat request back into this one's field names."""

    def __init__(self) -> None:
        self._origins: list[str] = []  # for each message of the chat, the one it came from
        self._pictures: dict[str, str] = {}  # the field of each picture, by its field in the chat
        self._translated = False

    def parse(self, body: bytes, ignored: IgnoredFields) -> ChatRequest:
        """Raises the 400 error that names the field of this request."""
        data = parse_object(body)
        fields = take(data, SAMPLING + REASONING, MessagesRequest.model_fields)
        request = check(MessagesRequest, data, ignored, RULES)
        messages = self._messages(request)
        fields |= {"messages": messages, **_options(request, ignored)}
        if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            fields["continue_final_message"] = True  # the caller has begun the answer
        self._translated = True
        return check_chat({name: value for name, value in fields.items() if value is not None}, ignored)

    def renamed(self, error: ServingError) -> ServingError:
        """The same error, with `param` and message in this request's field names."""
        if not self._translated:
            return error  # of a field of this format
        message, param = error.message, error.param or ""
        names = list(_NAMES)
        if picture := self._pictures.get(param):
            names = [(re.escape(param), picture)]
        elif origin := re.match(r"messages\[(\d+)\]", param):
            names.insert(0, (re.escape(origin[0]), self._origins[int(origin[1])]))
        for old, new in names:
            message, param = re.sub(old, new, message), re.sub(old, new, param)
        return ServingError(error.status, message, error.type, error.code, param or None, error.retry_after_s)

    def _messages(self, request: MessagesRequest) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if request.system:
            self._origins.append("system")
            messages.append({"role": "system", "content": _text(request.system, "system")})
        for number, turn in enumerate(request.messages):
            field = f"messages[{number}]"
            made = _assistant(turn, field) if turn.role == "assistant" else _user(turn, field)
            self._origins += [field] * len(made)
            messages += made
        for number, message in enumerate(messages):
            for index, part in enumerate(message["content"] if isinstance(message["content"], list) else []):
                if place := part.pop(_PLACE, None):
                    self._pictures[f"messages[{number}].content[{index}].image_url.url"] = place
        return messages


def _options(request: MessagesRequest, ignored: IgnoredFields) -> dict[str, Any]:
    fields: dict[str, Any] = {"stop": request.stop_sequences or None}
    for name in ("model", "max_tokens", "temperature", "top_p", "top_k", "stream"):
        fields[name] = getattr(request, name)
    if request.tools is not None:
        fields["tools"] = [_tool(tool) for tool in request.tools]
    if choice := request.tool_choice:
        fields["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
        if choice.type == "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name or ""}}
        if choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
    config = request.output_config or OutputConfig()
    if format_ := config.format or request.output_format:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": format_.schema_}}
    thinks = request.thinking is not None and request.thinking.type != "disabled"
    fields["chat_template_kwargs"] = {"enable_thinking": thinks}
    if thinks:
        fields["thinking_token_budget"] = request.thinking.budget_tokens if request.thinking else None
        fields["reasoning_effort"] = _EFFORT.get(config.effort or "", config.effort)
    elif config.effort:
        ignored.note("output_config.effort", harmless=True)
    return {name: value for name, value in fields.items() if value is not None}


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _user(turn: Turn, field: str) -> list[dict[str, Any]]:
    """Results of tools become messages of their own, in the order of the blocks."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(turn.content):
        place = f"{field}.content[{number}]"
        if block.type != "tool_result":
            parts.append(_part(block, place))
            continue
        if parts:
            messages.append({"role": turn.role, "content": _joined(parts)})
            parts = []
        messages.append(_result(block, place))
    if parts or not messages:
        messages.append({"role": turn.role, "content": _joined(parts)})
    return messages


def _result(block: Block, place: str) -> dict[str, Any]:
    content = block.content
    if isinstance(content, list):
        inner = [_part(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
        content = _joined([{"type": "text", "text": "Error:"}, *inner] if block.is_error else inner)
    elif block.is_error:
        content = f"Error: {content or ''}"
    return {"role": "tool", "tool_call_id": _required(block, "tool_use_id", place), "content": content or ""}


def _assistant(turn: Turn, field: str) -> list[dict[str, Any]]:
    if isinstance(turn.content, str):
        return [{"role": "assistant", "content": turn.content}]
    texts, reasoning, calls = [], [], []
    for number, block in enumerate(turn.content):
        place = f"{field}.content[{number}]"
        match block.type:
            case "text":
                texts.append(_required(block, "text", place))
            case "thinking":
                reasoning.append(_required(block, "thinking", place))
            case "redacted_thinking":
                continue  # somebody else's, and sealed
            case "tool_use":
                arguments = json.dumps(_required(block, "input", place), ensure_ascii=False)
                function = {"name": _required(block, "name", place), "arguments": arguments}
                calls.append({"id": _required(block, "id", place), "type": "function", "function": function})
            case _:
                raise invalid(f"`{place}.type`: a block of an answer cannot be {shown(block.type)}.", f"{place}.type")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _part(block: Block, place: str) -> dict[str, Any]:
    if block.type == "text":
        return {"type": "text", "text": _required(block, "text", place)}
    if block.type not in ("image", "document"):
        raise invalid(f"`{place}.type`: {shown(block.type)} cannot be part of a question.", f"{place}.type")
    source: Source = _required(block, "source", place)
    if block.type == "document":
        if source.type != "text":
            name = f"{place}.source.type"
            raise invalid(f"`{name}`: of documents only plain text is read. Given: {shown(source.type)}", name)
        title = f"{block.title}\n" if block.title else ""
        return {"type": "text", "text": f"{title}{_required(source, 'data', f'{place}.source')}"}
    if source.type == "text":
        raise invalid(f"`{place}.source.type` must be 'base64' or 'url'.", f"{place}.source.type")
    name, other = ("url", "data") if source.type == "url" else ("data", "url")
    if getattr(source, other):
        param = f"{place}.source.{other}"
        raise invalid(f"`{param}` does not belong to a source of the type '{source.type}'.", param)
    url = _required(source, name, f"{place}.source")
    if name == "data":
        url = f"data:{source.media_type or 'image/png'};base64,{url}"
    return {"type": "image_url", "image_url": {"url": url}, _PLACE: f"{place}.source.{name}"}


def _text(content: str | list[Block], field: str) -> str:
    if isinstance(content, str):
        return content
    parts = [_part(block, f"{field}[{number}]") for number, block in enumerate(content)]
    if any(part["type"] != "text" for part in parts):
        raise invalid(f"`{field}` must have text only.", field)
    return "\n".join(part["text"] for part in parts)


def _joined(parts: list[dict[str, Any]]) -> Any:
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _required(holder: Strict, name: str, place: str) -> Any:
    value = getattr(holder, name)
    if value is None:
        raise invalid(f"`{place}.{name}` is required.", f"{place}.{name}", "missing_required_parameter")
    return value
