"""The messages and tools of a conversation: which shapes they may have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from api.protocol.validation import Strict, parse_json


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: str | None = None  # harmless: pictures are always taken at the processor's own resolution


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


# A tag that begins with # is left out of the field's path in an error message.
Part = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[ImagePart, Tag("#image_url")],
    Discriminator(
        lambda part: f"#{part.get('type')}" if isinstance(part, dict) else f"#{getattr(part, 'type', None)}",
        custom_error_type="part",
        custom_error_message="must be an object whose `type` is one of 'text', 'image_url'",
    ),
]
Content = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Part], Field(min_length=1), Tag("#list")],
    Discriminator(
        lambda content: {str: "#string", list: "#list"}.get(type(content)),
        custom_error_type="content",
        custom_error_message="must be a string or a list of parts",
    ),
]


class CalledFunction(Strict):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, arguments: str) -> str:
        if not isinstance(parse_json(arguments), dict):
            raise PydanticCustomError("arguments", "must be a JSON object in a string")
        return arguments


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
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


class Function(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("#word")] | Annotated[NamedTool, Tag("#object")],
    Discriminator(
        lambda choice: {str: "#word", dict: "#object", NamedTool: "#object"}.get(type(choice)),
        custom_error_type="tool_choice",
        custom_error_message="must be 'auto', 'none', 'required' or an object that names a function",
    ),
]
