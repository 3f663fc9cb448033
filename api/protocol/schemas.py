"""Request bodies of chat completions, /tokenize and /detokenize: their fields, their limits, and the 400 errors.

`api.protocol.fields` has the rule for fields that are not listed here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from api.errors import ServingError, invalid
from api.protocol.body import parse_json, parse_object, shown
from api.protocol.fields import FieldRules, IgnoredFields, Strict, check

# Fields without an effect on the answer, and why.
HARMLESS = {
    "user": "for the caller's own use",
    "metadata": "for the caller's own use",
    "store": "nothing is stored here",
    "safety_identifier": "for the caller's own use",
    "prompt_cache_key": "prompts are cached by their content",
    "prompt_cache_retention": "prompts are cached while there is memory",
    "service_tier": "there is one tier",
}
# Fields of other servers, accepted with the values that match what this server does.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "best_of": (1,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "echo": (False,),
}
# Keys of messages, parts and tools that would change the answer.
CHANGES_THE_ANSWER = frozenset({"images", "audio", "video", "files", "documents", "prefix", "partial"})
CHAT_RULES = FieldRules(HARMLESS, WITHOUT_EFFECT, refused=CHANGES_THE_ANSWER)
TOKEN_RULES = FieldRules(defaults={"add_special_tokens": (False,), "add_generation_prompt": (True,)})
MAX_STOP = 4
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
# The longest reasoning in tokens; None: any length.
EFFORT_TOKENS: dict[str, int | None] = {"minimal": 64, "low": 512, "medium": 2048, "high": None, "xhigh": None}
MAX_DETOKENIZE = 1_000_000

class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: str | None = None  # harmless: images are always processed at the model's own resolution


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
    # Other fields of an answer, so that it can be sent back unchanged.
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
        has_images = isinstance(self.content, list) and any(isinstance(p, ImagePart) for p in self.content)
        if has_images and self.role not in ("user", "tool"):
            raise PydanticCustomError("images", "pictures belong to a message of the role 'user' or 'tool'")
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


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # harmless: padding against eavesdroppers, which TLS protects from


class TemplateOptions(Strict):
    enable_thinking: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: str = Field("answer", min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # a schema is enforced either way


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("#text")]
    | Annotated[JsonObjectFormat, Tag("#json_object")]
    | Annotated[JsonSchemaFormat, Tag("#json_schema")],
    Discriminator(
        lambda given: f"#{given.get('type')}" if isinstance(given, dict) else f"#{getattr(given, 'type', None)}",
        custom_error_type="response_format",
        custom_error_message="must be an object whose `type` is one of 'text', 'json_object', 'json_schema'",
    ),
]


class ChatRequest(Strict):
    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    # Length and number of answers.
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    loop_window: int | None = Field(None, ge=0, le=4096, description="tokens that repeat one pattern; 0: go on")
    # Sampling.
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    # Form of the answer.
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Reasoning.
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_token_budget: int | None = Field(None, ge=0)
    # Caching.
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def enable_thinking(self) -> bool:
        explicit = self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None
        return self.reasoning_effort != "none" if explicit is None else explicit

    @property
    def thinking_tokens(self) -> int | None:
        """The longest reasoning in tokens; None: any length."""
        if self.thinking_token_budget is not None:
            return self.thinking_token_budget
        return EFFORT_TOKENS.get(self.reasoning_effort or "high")

    @property
    def active_tools(self) -> list[Tool]:
        """The tools that the model may call: with a named `tool_choice` only that one."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            return [t for t in self.tools or [] if t.function.name == self.tool_choice.function.name]
        return self.tools or []

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must fit; None for free text."""
        match self.response_format:
            case JsonObjectFormat():
                return {"type": "object"}
            case JsonSchemaFormat(json_schema=json_schema):
                return json_schema.schema_
        return None

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse_chat(body: bytes, ignored: IgnoredFields) -> ChatRequest:
    """Adds to `ignored` what has no effect. Raises the 400 error that names the first field that is wrong."""
    return check_chat(parse_object(body), ignored)


def check_chat(data: dict[str, Any], ignored: IgnoredFields) -> ChatRequest:
    """A chat request as JSON, perhaps translated from another format. Raises the 400 error."""
    _check_stop(data.get("stop"))
    chat = check(ChatRequest, data, ignored, CHAT_RULES)
    check_consistency(chat)
    return chat


def _check_stop(stop: Any) -> None:
    strings = [stop] if isinstance(stop, str) else stop
    if strings is None:
        return
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise invalid(f"`stop` must be a string or a list of strings, none empty. Given: {shown(stop)}", "stop")
    if len(strings) > MAX_STOP:
        raise invalid(f"`stop` must have <= {MAX_STOP} strings. Given: {len(strings)}", "stop")


def check_consistency(chat: ChatRequest) -> None:
    """Raises the 400 error for fields that contradict each other."""
    names = [tool.function.name for tool in chat.tools or []]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise _conflict("tools", f"two functions have the name '{duplicate}'")
    if chat.must_call and not names:
        raise _conflict("tool_choice", "there are no `tools` to choose from")
    if chat.must_call and not chat.active_tools:
        raise _conflict("tool_choice", "it names a function that is not among `tools`")
    if chat.top_logprobs and not chat.logprobs:
        raise _conflict("top_logprobs", "needs `logprobs` to be true")
    if chat.stream_options is not None and not chat.stream:
        raise _conflict("stream_options", "needs `stream` to be true")
    explicit = chat.chat_template_kwargs.enable_thinking if chat.chat_template_kwargs else None
    if explicit is not None and chat.reasoning_effort is not None and explicit != (chat.reasoning_effort != "none"):
        raise _conflict("reasoning_effort", "contradicts `chat_template_kwargs.enable_thinking`")
    if chat.max_tokens and chat.max_completion_tokens and chat.max_tokens != chat.max_completion_tokens:
        raise _conflict("max_tokens", "differs from `max_completion_tokens`; give one of them")
    longest = chat.requested_max_tokens
    if longest is not None and (chat.min_tokens or 0) > longest:
        raise _conflict("min_tokens", f"must be <= {longest}, the longest answer. Given: {chat.min_tokens}")
    constraint = "response_format" if chat.answer_schema is not None else "tool_choice" if chat.must_call else None
    extension = "ignore_eos" if chat.ignore_eos else "min_tokens" if chat.min_tokens else None
    if constraint and extension:
        raise _conflict(extension, f"cannot continue past the end that `{constraint}` sets")
    for token, bias in (chat.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise _conflict("logit_bias", f"its names must be token ids. Given: {shown(token)}")
        if not -100 <= bias <= 100:
            raise _conflict("logit_bias", f"its values must be from -100 to 100. Given: {bias:g}")
    if len(chat.logit_bias or {}) > MAX_BIASES:
        raise _conflict("logit_bias", f"must have <= {MAX_BIASES} tokens. Given: {len(chat.logit_bias or {})}")


def _conflict(param: str, message: str) -> ServingError:
    return invalid(f"`{param}`: {message}.", param)


class TokenizeRequest(Strict):
    """Either plain text, or a conversation as the chat template renders it; images count one token each."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool = False


def parse_tokenize(body: bytes, ignored: IgnoredFields) -> TokenizeRequest:
    """Raises the 400 error that names the first field that is wrong."""
    request = check(TokenizeRequest, parse_object(body), ignored, TOKEN_RULES)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("`prompt` or `messages` must be given, and not both.", "prompt")
    return request


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_DETOKENIZE)


def parse_detokenize(body: bytes, ignored: IgnoredFields) -> DetokenizeRequest:
    """Raises the 400 error that names the first field that is wrong."""
    return check(DetokenizeRequest, parse_object(body), ignored, TOKEN_RULES)
