"""OpenAI's legacy text completions (POST /v1/completions): a text goes on, without a chat template.

Translated into the same internal request as a chat; the prompts are read as they are, and the answers written so.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from api.errors import ServingError, invalid
from api.protocol.body import parse_object, shown
from api.protocol.completion import Chunk, Completion, ServerSentEvent
from api.protocol.extensions import SAMPLING, take
from api.protocol.fields import FieldRules, IgnoredFields, Strict, check
from api.protocol.schemas import HARMLESS, HINTS, MAX_TOP_LOGPROBS, ChatRequest, Message, StreamOptions, check_chat

MAX_PROMPTS = 32
DEFAULT_TOKENS = 16  # as in OpenAI's API
OPENING_LENGTH = 256  # characters, or ids of tokens; what follows may differ in texts that begin alike
RULES = FieldRules(HARMLESS, hints=HINTS, echoed=frozenset())
_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_NO_MESSAGES = [Message(role="user", content="")]


class CompletionRequest(Strict):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="texts, or ids of tokens, as they are")
    model: str | None = None
    max_tokens: int | None = Field(None, ge=-1, description=f"default {DEFAULT_TOKENS}")
    n: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1, description="must equal `n`")
    echo: bool | None = Field(None, description="the prompt before the text; not with `logprobs`")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    response_format: dict[str, Any] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_text_or_ids(cls, prompt: Any) -> Any:
        ids = prompt if isinstance(prompt, list) else []
        lists = [ids] if not any(isinstance(item, list) for item in ids) else ids
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list)
            and (
                all(isinstance(item, str) for item in prompt)
                or all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in lists)
            )
        ):
            raise PydanticCustomError("prompt", "must be a string, a list of strings, or one or several lists of token ids")
        return prompt


class TextRequest(ChatRequest):
    """The internal request of a text completion."""

    messages: list[Message] = Field(default=_NO_MESSAGES)
    prompts: list[Any] = Field(default_factory=list)  # of str, or of tuple[int, ...]
    echo: bool = False

    @property
    def choices(self) -> int:
        return (self.n or 1) * len(self.prompts)

    @property
    def opening(self) -> list[str]:
        first = self.prompts[0]
        return [self.cache_salt or "", "text", str(first[:OPENING_LENGTH])]

    @property
    def enable_thinking(self) -> bool:
        return False


def parse_text(body: bytes, ignored: IgnoredFields) -> TextRequest:
    """Raises the 400 error that names the field of this request."""
    data = parse_object(body)
    fields = take(data, SAMPLING, CompletionRequest.model_fields)
    given = data.get("prompt")
    request = check(CompletionRequest, data, ignored, RULES)
    if request.best_of not in (None, request.n or 1):
        raise invalid(f"`best_of` must equal `n`. Given: {request.best_of}", "best_of", "unsupported_value")
    if request.echo and request.logprobs is not None:
        raise invalid("`echo`: there are no log probabilities of a prompt; leave out `logprobs`.", "echo")
    for name in ("model", "n", "stop", "stream", "stream_options", "temperature", "top_p", "response_format"):
        if (value := data.get(name)) is not None:
            fields[name] = value
    if request.max_tokens is not None or not any(fields.get(word) for word in ("max_new_tokens", "n_predict")):
        fields["max_tokens"] = request.max_tokens or DEFAULT_TOKENS
    if request.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": request.logprobs}
    fields |= {"prompts": _prompts(given), "echo": bool(request.echo)}
    return check_chat(fields, ignored, TextRequest)


def _prompts(given: Any) -> list[str | tuple[int, ...]]:
    if isinstance(given, str):
        return [given]
    prompts: list[Any] = [given] if all(isinstance(item, int) for item in given) else given
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise invalid(f"`prompt` must have from 1 to {MAX_PROMPTS} prompts. Given: {len(prompts)}", "prompt")
    if not all(prompts):
        raise invalid(f"`prompt`: a prompt has no tokens. Given: {shown(given)}", "prompt")
    return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]


class TextFormatter:
    """Text completions: their chunks are the events. Implements ResponseFormatter."""

    def __init__(self, request: TextRequest, completion: Completion) -> None:
        self._request = request
        self._completion = completion
        self._texts = [_Text(bool(request.logprobs)) for _ in completion.choices]

    def opening(self) -> list[ServerSentEvent]:
        if not self._request.echo:
            return []
        prompts, per_prompt = self._request.prompts, self._request.n or 1
        echoed = [prompt if isinstance(prompt, str) else "" for prompt in prompts for _ in range(per_prompt)]
        return [self._event(index, text, None) for index, text in enumerate(echoed)]

    def format(self, chunk: Chunk) -> list[ServerSentEvent]:
        [choice] = chunk["choices"]
        text, reason = choice["delta"].get("content") or "", choice["finish_reason"]
        if not text and reason is None and choice["logprobs"] is None:
            return []
        return [self._event(choice["index"], text, choice["logprobs"], reason)]

    def closing(self) -> list[ServerSentEvent]:
        options = self._request.stream_options
        usage = [self._head(choices=[], **self._totals())] if options and options.include_usage else []
        return [*(ServerSentEvent(None, chunk) for chunk in usage), ServerSentEvent(None, "[DONE]")]

    def failed(self, error: ServingError) -> ServerSentEvent:
        return ServerSentEvent(None, error.body())

    def body(self) -> dict[str, Any]:
        choices = [
            {"index": index, "text": text.text, "logprobs": text.logprobs, "finish_reason": choice.finish_reason}
            for index, (text, choice) in enumerate(zip(self._texts, self._completion.choices, strict=True))
        ]
        return self._head(choices=choices, timings=self._completion.timings(), **self._totals())

    def _event(self, index: int, text: str, logprobs: Any, reason: str | None = None) -> ServerSentEvent:
        added = self._texts[index].add(text, logprobs)
        choice = {"index": index, "text": text, "logprobs": added, "finish_reason": reason}
        return ServerSentEvent(None, self._head(choices=[choice]))

    def _totals(self) -> dict[str, Any]:
        ignored = self._completion.ignored
        return {"usage": self._completion.usage(), **({"ignored": ignored} if ignored else {})}

    def _head(self, **fields: Any) -> dict[str, Any]:
        completion = self._completion
        return {
            "id": f"cmpl-{completion.id}", "object": "text_completion", "created": completion.created,
            "model": completion.model, "request_id": completion.request_id, **fields,
        }  # fmt: skip


class _Text:
    """One choice so far, and its log probabilities in the columns of the legacy format."""

    def __init__(self, with_logprobs: bool) -> None:
        self.text = ""
        self.logprobs: dict[str, list[Any]] | None = {name: [] for name in _COLUMNS} if with_logprobs else None
        self._offset = 0

    def add(self, text: str, logprobs: Any) -> dict[str, list[Any]] | None:
        self.text += text
        if logprobs is None or self.logprobs is None:
            return None
        added: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for entry in logprobs["content"]:
            added["tokens"].append(entry["token"])
            added["token_logprobs"].append(entry["logprob"])
            added["top_logprobs"].append({top["token"]: top["logprob"] for top in entry["top_logprobs"]})
            added["text_offset"].append(self._offset)
            self._offset += len(entry["token"])
        for name, column in added.items():
            self.logprobs[name] += column
        return added
