"""OpenAI's newer request format (POST /v1/responses), translated into a chat request.

Nothing is stored, so every request must contain the whole conversation; `previous_response_id` is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from api.errors import ServingError, invalid
from api.protocol.body import parse_object, shown
from api.protocol.extensions import REASONING, SAMPLING, take
from api.protocol.fields import FieldRules, IgnoredFields, Strict, check
from api.protocol.message_words import Detail, note_detail
from api.protocol.schemas import CHANGES_THE_ANSWER, HARMLESS, HINTS, ChatRequest, check_chat

RULES = FieldRules(
    HARMLESS,
    defaults={"background": (False,)},
    hints={**HINTS, "max_tool_calls": "it limits built-in tools, of which there are none"},
    echoed=frozenset({"input", "tools"}),
    refused=CHANGES_THE_ANSWER | {"file_id", "file_url", "file_data"},  # there are no stored files
)
LOGPROBS = "message.output_text.logprobs"


class Part(Strict):
    type: Literal["input_text", "output_text", "text", "refusal", "input_image"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: Detail | None = None
    annotations: Any = None
    logprobs: Any = None


class ReasoningPart(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


def _text_or(part: Any) -> Any:
    """A string or a list of parts, of which an error names the field and not the kind."""
    return Annotated[
        Annotated[str, Tag("#string")] | Annotated[list[part], Tag("#list")],
        Discriminator(
            lambda given: "#string" if isinstance(given, str) else "#list" if isinstance(given, list) else None,
            custom_error_type="content",
            custom_error_message="must be a string or a list of parts",
        ),
    ]


AnyPart = Annotated[
    Annotated[Part, Tag("#part")] | Annotated[ReasoningPart, Tag("#reasoning")],
    # Anything but reasoning is checked as a part of a message, so that the error names its `type`.
    Discriminator(lambda part: "#reasoning" if _type_of(part) in ("reasoning_text", "summary_text") else "#part"),
]


class Item(Strict):
    """A message, a tool call, its result, or reasoning; output items can be sent back as they came."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: _text_or(AnyPart) | None = None  # type: ignore[valid-type]
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: _text_or(Part) | None = None  # type: ignore[valid-type]
    summary: list[ReasoningPart] | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Namespace(Strict):
    """Functions under a common name; a call of one says both."""

    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: list[FunctionTool]


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("#function")] | Annotated[Namespace, Tag("#namespace")],
    # Anything but a namespace is checked as a function, so that the error names its `type`.
    Discriminator(lambda tool: "#namespace" if _type_of(tool) == "namespace" else "#function"),
]


def _type_of(tool: Any) -> Any:
    return tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)


class ReasoningOptions(Strict):
    effort: str | None = None
    summary: str | None = None  # harmless: reasoning is returned whole


class TextOptions(Strict):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class StreamOptions(Strict):
    include_obfuscation: bool | None = None  # harmless, as in chat completions


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
    tools: list[AnyTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = Field(None, description=f"`{LOGPROBS}`; nothing else there is to include")
    top_logprobs: int | None = None
    truncation: Literal["disabled", "auto"] | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = Field(None, description="sent back with the answer")


# Fields of the chat request, and their names in this format.
_NAMES = (
    (r"max_tokens", "max_output_tokens"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"image_url\.url", "image_url"),
)


class Translation:
    """Translates one request into a chat request, and the errors of the chat request back into this one's field names."""

    def __init__(self) -> None:
        self.request = ResponseRequest(input="", include=None, metadata=None)
        self._origins: list[str] = []  # for each message, the field it came from
        self._outputs: set[str] = set()  # those of them whose content is a tool's output
        self._checked = False  # from then on errors are those of the chat request

    def parse(self, body: bytes, ignored: IgnoredFields) -> ChatRequest:
        """Raises the 400 error that names the field of this request."""
        data = parse_object(body)
        fields = take(data, SAMPLING + REASONING, ResponseRequest.model_fields)
        self.request = check(ResponseRequest, data, ignored, RULES)
        self._checked = True
        self._note(ignored)
        return check_chat({**fields, **self._fields()}, ignored)

    def renamed(self, error: ServingError) -> ServingError:
        """The same error, with `param` and message in this request's field names."""
        if not self._checked:
            return error
        message, param = error.message, error.param or ""
        if origin := re.match(r"messages\[(\d+)\]", param):
            field = self._origins[int(origin[1])]
            names = [(re.escape(origin[0]), field), *_NAMES]
            if field in self._outputs:
                names.insert(0, (re.escape(origin[0]) + r"\.content", f"{field}.output"))
        else:
            names = [(r"^messages$", "input"), (r"`messages`", "`input`"), *_NAMES]
        for old, new in names:
            message, param = re.sub(old, new, message), re.sub(old, new, param)
        return ServingError(error.status, message, error.type, error.code, param or None, error.retry_after_s)

    def _note(self, ignored: IgnoredFields) -> None:
        """Name what has no effect though its field is known."""
        request = self.request
        for number, name in enumerate(request.include or []):
            if name != LOGPROBS:
                ignored.note(f"include[{number}]", harmless=True)
        if request.truncation == "auto":
            ignored.note("truncation", harmless=True)  # a conversation that is too long is refused, not cut
        if request.metadata:
            ignored.note("metadata", harmless=True)
        for number, item in enumerate(request.input if isinstance(request.input, list) else []):
            for name in ("content", "output"):
                parts = getattr(item, name)
                for index, part in enumerate(parts if isinstance(parts, list) else []):
                    note_detail(getattr(part, "detail", None), f"input[{number}].{name}[{index}].detail", ignored)

    @property
    def functions(self) -> dict[str, tuple[str, str]]:
        """Namespace and name of each function that is in a namespace, by its name in the chat request."""
        spaces = [tool for tool in self.request.tools or [] if isinstance(tool, Namespace)]
        return {_full_name(space.name, tool.name): (space.name, tool.name) for space in spaces for tool in space.tools}

    def _tools(self) -> list[dict[str, Any]]:
        tools = []
        for tool in self.request.tools or []:
            inner = tool.tools if isinstance(tool, Namespace) else [tool]
            space = tool.name if isinstance(tool, Namespace) else None
            for function in inner:
                fields = {**function.model_dump(exclude={"type"}), "name": _full_name(space, function.name)}
                tools.append({"type": "function", "function": {k: v for k, v in fields.items() if v is not None}})
        return tools

    def _fields(self) -> dict[str, Any]:
        request = self.request
        fields: dict[str, Any] = {"messages": self._messages(), "max_tokens": request.max_output_tokens}
        for name in ("model", "temperature", "top_p", "stream", "parallel_tool_calls"):
            fields[name] = getattr(request, name)
        if request.reasoning:
            fields["reasoning_effort"] = request.reasoning.effort
        if request.text and request.text.format:
            fields["response_format"] = _format(request.text.format)
        if request.tools is not None:
            fields["tools"] = self._tools()
        fields["tool_choice"] = request.tool_choice
        if isinstance(request.tool_choice, dict) and "name" in request.tool_choice:
            kind = {k: v for k, v in request.tool_choice.items() if k not in ("name", "namespace")}
            name = _full_name(request.tool_choice.get("namespace"), request.tool_choice["name"])
            fields["tool_choice"] = {**kind, "function": {"name": name}}
        if request.text:
            fields["verbosity"] = request.text.verbosity
        if LOGPROBS in (request.include or ()) or request.top_logprobs:
            fields |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return {name: value for name, value in fields.items() if value is not None}

    def _messages(self) -> list[dict[str, Any]]:
        """Consecutive reasoning, text and calls of the assistant become one message."""
        messages: list[dict[str, Any]] = []
        if self.request.instructions:
            self._origins.append("instructions")
            messages.append({"role": "system", "content": self.request.instructions})
        items = self.request.input
        for number, item in enumerate([Item(role="user", content=items)] if isinstance(items, str) else items):
            field = "input" if isinstance(items, str) else f"input[{number}]"
            message = _message(item, field)
            if item.type == "function_call_output":
                self._outputs.add(field)
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


def _full_name(namespace: str | None, name: str) -> str:
    """The name of a function in the chat request, which knows no namespaces."""
    return f"{namespace}.{name}" if namespace else name


def _message(item: Item, field: str) -> dict[str, Any]:
    required = {"message": ("role", "content"), "function_call": ("name", "arguments"),
              "function_call_output": ("call_id", "output"), "reasoning": ()}  # fmt: skip
    for name in required[item.type]:
        if getattr(item, name) is None:
            raise invalid(f"`{field}.{name}` is required.", f"{field}.{name}", "missing_required_parameter")
    if item.type == "function_call":
        function = {"name": _full_name(item.namespace, item.name or ""), "arguments": item.arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": item.call_id, "function": function}]}
    if item.type == "function_call_output":
        return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output, f"{field}.output")}
    if item.type == "reasoning":
        parts = item.content if isinstance(item.content, list) and item.content else item.summary or []
        return {"role": "assistant", "content": "", "reasoning_content": "\n".join(part.text or "" for part in parts)}
    return {"role": item.role, "content": _content(item.content, f"{field}.content")}


def _content(content: Any, field: str) -> Any:
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        required = {"input_image": "image_url", "refusal": "refusal"}.get(part.type, "text")
        if getattr(part, required, None) is None:
            name = f"{field}[{number}].{required}"
            raise invalid(f"`{name}` is required.", name, "missing_required_parameter")
        for other in {"text", "refusal", "image_url"} - {required}:
            if getattr(part, other, None):
                name = f"{field}[{number}].{other}"
                raise invalid(f"`{name}` does not belong to a part of the type {shown(part.type)}.", name)
        image = {"type": "image_url", "image_url": {"url": getattr(part, "image_url", None)}}
        parts.append(image if required == "image_url" else {"type": "text", "text": getattr(part, required)})
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        if given.get("type") not in ("text", "json_object"):
            allowed = "'text', 'json_object', 'json_schema'"
            message = f"`text.format.type` must be one of {allowed}. Given: {shown(given.get('type'))}"
            raise invalid(message, "text.format.type")
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
