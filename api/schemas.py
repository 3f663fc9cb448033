"""The chat request: which fields there are, what they may be, and the sentence that refuses the rest.

A field is honoured or refused; only the harmless ones listed here are accepted without effect.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from api.errors import ServingError, invalid

# Notes for the caller's own books; they ask nothing of the model.
HARMLESS = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"})
# Fields of other servers, accepted when they ask for what happens anyway.
WITHOUT_EFFECT: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "min_p": 0,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
}
MAX_STOP = 4


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: str | None = None  # harmless: pictures are always taken at the processor's own resolution


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


# A tag that begins with # is left out of the field's path in an error message.
Part = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[ImagePart, Tag("#image_url")],
    Discriminator(
        lambda part: f"#{part.get('type')}" if isinstance(part, dict) else None,
        custom_error_type="part",
        custom_error_message="must be an object whose `type` is one of 'text', 'image_url'",
    ),
]
Content = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Part], Tag("#list")],
    Discriminator(
        lambda content: {str: "#string", list: "#list"}.get(type(content)),
        custom_error_type="content",
        custom_error_message="must be a string or a list of parts",
    ),
]


class CalledFunction(_Strict):
    name: str
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> CalledFunction:
        if not isinstance(parse_json(self.arguments), dict):
            raise PydanticCustomError("arguments", "`arguments` must be a JSON object in a string")
        return self


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What an answer carries besides, so that it can be sent back as it came.
    boxes: Any = None
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("missing_content", "needs `content`")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "`tool_calls` belong to a message of the role 'assistant'")
        pictures = isinstance(self.content, list) and any(isinstance(p, ImagePart) for p in self.content)
        if pictures and self.role not in ("user", "tool"):
            raise PydanticCustomError("pictures", "pictures belong to a message of the role 'user' or 'tool'")
        return self


class Function(_Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class StreamOptions(_Strict):
    include_usage: bool = False


class TemplateOptions(_Strict):
    enable_thinking: bool = True


class ChatRequest(_Strict):
    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def enable_thinking(self) -> bool:
        return self.chat_template_kwargs is None or self.chat_template_kwargs.enable_thinking

    @property
    def active_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else (self.tools or [])

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse_chat(body: bytes) -> ChatRequest:
    """Raises the 400 error that names the first field that is wrong."""
    data = parse_json(body)
    if not isinstance(data, dict):
        raise invalid("The body must be a JSON object of whole Unicode characters.", code="invalid_json")
    known: dict[str, Any] = {}
    for name, value in data.items():
        if name in ChatRequest.model_fields:
            known[name] = value
        elif name not in HARMLESS and value is not None and value != WITHOUT_EFFECT.get(name):
            raise _unsupported(name, value)
    _check_stop(known.get("stop"))
    try:
        return ChatRequest.model_validate(known)
    except ValidationError as error:
        raise _explain(error.errors()[0]) from None


def parse_json(text: str | bytes) -> Any:
    """The value, or None if it is not JSON or has half a character (a lone surrogate) in it."""
    try:
        value = json.loads(text)
        if "\\u" in text if isinstance(text, str) else b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError):
        return None


def _unsupported(name: str, value: Any) -> ServingError:
    if name in WITHOUT_EFFECT:
        wanted = json.dumps(WITHOUT_EFFECT[name])
        return invalid(f"`{name}` must be {wanted}. Given: {_shown(value)}", name, "unsupported_value")
    return invalid(f"`{name}` is not supported.", name, "unsupported_parameter")


def _check_stop(stop: Any) -> None:
    strings = [stop] if isinstance(stop, str) else stop
    if strings is None:
        return
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise invalid(f"`stop` must be a string or a list of strings, none empty. Given: {_shown(stop)}", "stop")
    if len(strings) > MAX_STOP:
        raise invalid(f"`stop` must have <= {MAX_STOP} strings. Given: {len(strings)}", "stop")


# pydantic's kinds of error, in this project's words.
_BOUNDS = {"greater_than_equal": (">=", "ge"), "less_than_equal": ("<=", "le"), "greater_than": (">", "gt"),
           "less_than": ("<", "lt")}  # fmt: skip
_KINDS = {
    "string_type": "a string", "string_unicode": "a string of whole characters", "bool_type": "true or false",
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "finite_number": "a finite number", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
}  # fmt: skip


def _explain(problem: ErrorDetails) -> ServingError:
    param = _path(problem["loc"])
    context, kind = problem.get("ctx", {}), problem["type"]
    given = f" Given: {_shown(problem['input'])}"
    if kind == "missing":
        return invalid(f"`{param}` is required.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        return invalid(f"`{param}` is not supported.", param, "unsupported_parameter")
    if kind in _BOUNDS:
        sign, bound = _BOUNDS[kind]
        return invalid(f"`{param}` must be {sign} {context[bound]:g}.{given}", param)
    if kind == "literal_error":
        return invalid(f"`{param}` must be {context['expected']}.{given}", param)
    if kind == "string_pattern_mismatch":
        return invalid(f"`{param}` must match {context['pattern']}.{given}", param)
    if kind == "too_short":
        least, count = context["min_length"], context["actual_length"]
        return invalid(f"`{param}` must have >= {least} items. Given: {count}", param)
    if kind in _KINDS:
        return invalid(f"`{param}` must be {_KINDS[kind]}.{given}", param)
    if kind in ("part", "content"):
        return invalid(f"`{param}` {problem['msg']}.{given}", param)
    return invalid(f"`{param}`: {problem['msg']}.", param)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].text`"""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("#"):
            path += f".{step}" if path else step
    return path


def _shown(value: Any) -> str:
    """Enough of a value to recognise it; never a whole prompt or picture."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
