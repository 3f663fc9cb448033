"""Request bodies of chat completions, /tokenize and /detokenize: their fields, their limits, and the 400 errors.

`api.protocol.fields` has the rule for fields that are not listed here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from api.errors import ServingError, invalid
from api.protocol.body import parse_json, parse_object, shown
from api.protocol.fields import FieldRules, IgnoredFields, Strict, check
from api.protocol.message_words import Detail, translate_messages, translate_tools
from api.protocol.vendor_words import translate

# Fields of OpenAI's API without an effect on the answer, and why.
HARMLESS = {
    "user": "for the caller's own use",
    "metadata": "for the caller's own use",
    "store": "nothing is stored here",
    "safety_identifier": "for the caller's own use",
    "prompt_cache_key": "prompts are cached by their content",
    "prompt_cache_retention": "prompts are cached while there is memory",
    "service_tier": "there is one tier",
}
# Other servers' and clients' fields without one.
HINTS = {
    **dict.fromkeys(
        ("user_id", "session_id", "chat_id", "conversation_id", "id", "message_id", "parent_id", "variables", "model_item",
         "background_tasks", "client_metadata", "trace", "tags"),
        "for the caller's own use",
    ),
    **dict.fromkeys(("provider", "route", "models"), "there is one model"),
    **dict.fromkeys(("cache_control", "cache_prompt", "id_slot"), "prompts are cached by their content"),
    "keep_alive": "the model stays loaded",
    **dict.fromkeys(("return_progress", "timings_per_token", "details"), "every answer has its timings and its position in the queue"),
    "tool_stream": "a call is sent once its arguments are complete",
    "prediction": "a guess at the answer, to save time",
    **dict.fromkeys(("backend_sampling", "guided_decoding_backend"), "how the answer is computed, not what it is"),
    "spaces_between_special_tokens": "special tokens have no spaces",
    **dict.fromkeys(
        ("xtc_threshold", "dynatemp_exponent", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
         "dry_sequence_breakers", "mirostat_tau", "mirostat_eta"),
        "belongs to something that is off",
    ),
}  # fmt: skip
# Fields of other servers, accepted with the values that match what this server does.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "best_of": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "echo": (False,),
    "add_special_tokens": (False,),
    "use_beam_search": (False,),
    "priority": (0,),
    "mm_processor_kwargs": ({},),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "detokenize": (True,),
    "stream_reasoning": (True,),
    "watermark_enabled": (False,),
    "watermark": (False,),
    "safe_prompt": (False,),
    "return_full_text": (False,),
    "no_repeat_ngram_size": (0,),
    "typ_p": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "mirostat": (0,),
    "min_keep": (0,),
    "n_probs": (0,),
    "n_keep": (0,),
}
# Keys of messages, parts and tools that would change the answer.
CHANGES_THE_ANSWER = frozenset(
    {"images", "image", "image_url", "attachments", "audio", "video", "file", "files", "documents", "prefix", "partial",
     "min_pixels", "max_pixels", "resized_width", "resized_height", "crop", "rotation", "fps"}
)
CHAT_RULES = FieldRules(HARMLESS, defaults=WITHOUT_EFFECT, hints=HINTS, refused=CHANGES_THE_ANSWER)
TOKEN_RULES = FieldRules(defaults={"add_special_tokens": (False,), "add_generation_prompt": (True,)})
MAX_STOP = 64
MAX_TOOLS = 1024
MAX_CHOICES = 8
MAX_PATTERN, MAX_ALTERNATIVES, MAX_GRAMMAR = 10_000, 1000, 100_000
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
# The longest reasoning in tokens; None: any length.
EFFORT_TOKENS: dict[str, int | None] = {
    "minimal": 64, "low": 512, "medium": 2048, "high": None, "xhigh": None, "max": None, "auto": None,
}  # fmt: skip
MAX_DETOKENIZE = 1_000_000


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Detail | None = None  # named: images are always processed at the model's own resolution


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
    Annotated[str, Tag("#string")] | Annotated[list[Part], Tag("#list")],
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
        # Null is an empty text; so is what an assistant or a tool leaves out.
        if self.content is None and "content" not in self.model_fields_set and self.role not in ("assistant", "tool"):
            raise PydanticCustomError("missing_content", "needs `content`")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "`tool_calls` belong to a message of the role 'assistant'")
        has_images = isinstance(self.content, list) and any(isinstance(p, ImagePart) for p in self.content)
        if has_images and self.role not in ("user", "tool"):
            raise PydanticCustomError("images", "pictures belong to a message of the role 'user' or 'tool'")
        return self


class Function(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")
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


class AllowedTools(Strict):
    """Some of the tools: the model may call them, or must."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool] = Field(min_length=1)


def _kind_of_choice(choice: Any) -> str | None:
    if isinstance(choice, str):
        return "#word"
    if isinstance(choice, AllowedTools) or (isinstance(choice, dict) and choice.get("type") == "allowed_tools"):
        return "#allowed"
    return "#object" if isinstance(choice, dict | NamedTool) else None


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("#word")]
    | Annotated[NamedTool, Tag("#object")]
    | Annotated[AllowedTools, Tag("#allowed")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message="must be 'auto', 'none', 'required' or an object that names a function",
    ),
]
FunctionCall = Annotated[
    Annotated[Literal["auto", "none"], Tag("#word")] | Annotated[NamedFunction, Tag("#object")],
    Discriminator(
        lambda call: {str: "#word", dict: "#object", NamedFunction: "#object"}.get(type(call)),
        custom_error_type="function_call",
        custom_error_message="must be 'auto', 'none' or an object that names a function",
    ),
]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
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
    strict: bool | None = None  # what cannot be enforced is refused, and not checked afterwards


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
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP)
    include_stop_str_in_output: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    loop_window: int | None = Field(None, ge=0, le=4096, description="tokens that repeat one pattern; 0: go on")
    # Sampling.
    temperature: float | None = Field(None, ge=0, le=100)
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
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, min_length=1, max_length=MAX_PATTERN)
    choice: list[str] | None = Field(None, min_length=1, max_length=MAX_ALTERNATIVES)
    grammar: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR)
    verbosity: Literal["low", "medium", "high"] | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = Field(None, max_length=MAX_TOOLS)
    function_call: FunctionCall | None = None
    # The conversation.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    request_id: str | None = Field(None, min_length=1, max_length=256)
    # Reasoning.
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "auto"] | None = None
    thinking_token_budget: int | None = Field(None, ge=0)
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    # Caching.
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def opening(self) -> list[str]:
        """What the questions of one conversation share: its instructions, and the first image of the first user, or else the text.

        A later image is left out: with it the opening would change in the middle of a conversation.
        """
        parts = [self.cache_salt or ""]
        for message in self.messages:
            content = message.content if isinstance(message.content, list) else []
            image = next((part.image_url.url for part in content if isinstance(part, ImagePart)), None)
            if message.role == "user" and image is not None:
                return [*parts, "image", image]
            text = message.content if isinstance(message.content, str) else "".join(p.text for p in content if isinstance(p, TextPart))
            parts += [message.role, text]
            if message.role == "user":
                break
        return parts

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
    def all_tools(self) -> list[Tool]:
        """`tools`, or `functions`, their older form."""
        return self.tools or [Tool(type="function", function=function) for function in self.functions or []]

    @property
    def uses_functions(self) -> bool:
        """Whether calls are expected in the older form, one at most."""
        return bool(self.functions) and not self.tools

    @property
    def chosen_names(self) -> list[str] | None:
        """The only functions that may be called; None: any."""
        if isinstance(self.function_call, NamedFunction):
            return [self.function_call.name]
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool.function.name for tool in self.tool_choice.tools]
        return None

    @property
    def active_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        if "none" in (self.tool_choice, self.function_call):
            return []
        names = self.chosen_names
        return [tool for tool in self.all_tools if names is None or tool.function.name in names]

    @property
    def must_call(self) -> bool:
        choice = self.tool_choice
        return (
            choice == "required"
            or isinstance(choice, NamedTool)
            or (isinstance(choice, AllowedTools) and choice.mode == "required")
            or isinstance(self.function_call, NamedFunction)
        )

    @property
    def many_calls(self) -> bool:
        return self.parallel_tool_calls is not False and not self.uses_functions

    @property
    def constraints(self) -> list[str]:
        """The fields that constrain the text of the answer."""
        given = {
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "response_format": self.answer_schema,
        }
        return [name for name, value in given.items() if value is not None]

    @property
    def reasoning_place(self) -> Literal["separate", "inline", "nowhere"]:
        if self.include_reasoning is False:
            return "nowhere"
        return "inline" if self.separate_reasoning is False else "separate"

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
    def is_strict(self) -> bool:
        """Whether a schema must be enforced as a whole."""
        return isinstance(self.response_format, JsonSchemaFormat) and bool(self.response_format.json_schema.strict)

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse_chat(body: bytes, ignored: IgnoredFields) -> ChatRequest:
    """Adds to `ignored` what has no effect. Raises the 400 error that names the first field that is wrong."""
    chat: ChatRequest = check_chat(parse_object(body), ignored)
    _name_unread(chat.messages, ignored)
    return chat


def _name_unread(messages: list[Message], ignored: IgnoredFields) -> None:
    """Names what the chat templates of GLM do not read: names of authors, and reasoning before the last question."""
    last = max((number for number, message in enumerate(messages) if message.role == "user"), default=0)
    for message in messages:
        if message.name:
            ignored.note("messages[].name", harmless=True)
    for message in messages[:last]:
        for field in ("reasoning_content", "reasoning"):
            if getattr(message, field):
                ignored.note(f"messages[].{field}", harmless=True)


Chat = TypeVar("Chat", bound=ChatRequest)


def check_chat(data: dict[str, Any], ignored: IgnoredFields, kind: type[Chat] = ChatRequest) -> Chat:  # type: ignore[assignment]
    """A chat request as JSON, perhaps translated from another format. Raises the 400 error."""
    words = translate(data, ignored)
    try:
        _check_stop(data.get("stop"))
        chat = check(kind, data, ignored, CHAT_RULES)
        check_consistency(chat)
    except ServingError as error:
        raise words.renamed(error) from None
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
    names = [tool.function.name for tool in chat.all_tools]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise _conflict("tools", f"two functions have the name '{duplicate}'")
    chooser, offered = ("function_call", "functions") if chat.function_call else ("tool_choice", "tools")
    if chat.must_call and not names:
        raise _conflict(chooser, f"there are no `{offered}` to choose from")
    if not set(chat.chosen_names or ()) <= set(names):
        raise _conflict(chooser, f"it names a function that is not among `{offered}`")
    if chat.top_logprobs and not chat.logprobs:
        raise _conflict("top_logprobs", "needs `logprobs` to be true")
    explicit = chat.chat_template_kwargs.enable_thinking if chat.chat_template_kwargs else None
    if explicit is not None and chat.reasoning_effort is not None and explicit != (chat.reasoning_effort != "none"):
        raise _conflict("reasoning_effort", "contradicts `chat_template_kwargs.enable_thinking`")
    if len(chat.constraints) > 1:
        raise _conflict(chat.constraints[0], f"contradicts `{chat.constraints[1]}`; give one of them")
    if chat.continue_final_message and (chat.messages[-1].role != "assistant" or chat.messages[-1].tool_calls):
        raise _conflict("continue_final_message", "needs a last message of the role 'assistant', without calls")
    if chat.add_generation_prompt == bool(chat.continue_final_message):
        raise _conflict("add_generation_prompt", "must be the opposite of `continue_final_message`")
    longest = chat.requested_max_tokens
    if longest is not None and (chat.min_tokens or 0) > longest:
        raise _conflict("min_tokens", f"must be <= {longest}, the longest answer. Given: {chat.min_tokens}")
    constraint = next(iter(chat.constraints), "tool_choice" if chat.must_call else None)
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
    """Either plain text, or a conversation as the chat template renders it, with the tokens of its images."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool = False


def parse_tokenize(body: bytes, ignored: IgnoredFields) -> TokenizeRequest:
    """Raises the 400 error that names the first field that is wrong."""
    data = parse_object(body)
    translate_messages(data.get("messages"), ignored)
    translate_tools(data.get("tools"), ignored)
    request = check(TokenizeRequest, data, ignored, TOKEN_RULES)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("`prompt` or `messages` must be given, and not both.", "prompt")
    return request


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_DETOKENIZE)


def parse_detokenize(body: bytes, ignored: IgnoredFields) -> DetokenizeRequest:
    """Raises the 400 error that names the first field that is wrong."""
    return check(DetokenizeRequest, parse_object(body), ignored, TOKEN_RULES)
