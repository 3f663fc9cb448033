"""Turns engine events into chat completions: deltas while they stream; message, usage and timings at the end.

The message is assembled from the same deltas that a stream sends, so both have the same content.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from fastapi.sse import format_sse_event

from api.engine.request import Delta, Done, TokenLogprob
from api.engine.text.markup import END_THINK, THINK
from api.engine.text.tokenizer import Vocabulary
from api.errors import ServingError
from api.parsing.boxes import region_entry
from api.parsing.output import Boxes, Call, Content, OutputParser, Piece, Reasoning, VerbatimParser

Chunk = dict[str, Any]
ReasoningPlace = Literal["separate", "inline", "nowhere"]  # beside the content, in it between its tags, or not at all

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one at each call


@dataclass(frozen=True)
class PromptFacts:
    """The facts about a prompt that its answer needs."""

    image_tokens: int = 0
    image_sizes: tuple[tuple[int, int], ...] = ()  # width and height in pixels, upright
    question_image: int | None = None  # the image that the last question refers to, if it is exactly one
    tokens: int = 0  # of all prompts, images included


@dataclass
class Choice:
    """One of the `n` answers to a request. `feed` and `finish` return its part of each chunk."""

    index: int
    call_id: str
    parser: OutputParser | VerbatimParser
    prompt: PromptFacts
    vocabulary: Vocabulary | None  # None: whoever wrote the answer sends its log probabilities as text
    with_logprobs: bool = False
    reasoning_place: ReasoningPlace = "separate"
    tokens: int = 0  # so far
    done: Done | None = None
    reasoning_tokens: int = 0
    _boxes: list[dict[str, Any]] = field(default_factory=list)
    _tool_calls: list[dict[str, Any]] = field(default_factory=list)
    _text: dict[str, str] = field(default_factory=lambda: {"content": "", "reasoning": ""})
    _logprobs: list[dict[str, Any]] = field(default_factory=list)
    _unsent_logprobs: list[dict[str, Any]] = field(default_factory=list)
    _inside_reasoning: bool = False  # of reasoning that is written into the content

    def feed(self, deltas: list[Delta]) -> list[Chunk]:
        """Text of several deltas becomes one chunk, as far as it is of the same kind."""
        pieces: list[Piece] = []
        for delta in deltas:
            was_thinking = self.parser.thinking
            for piece in self._placed(self._pieces(delta)):
                _append(pieces, piece)
            self.tokens += delta.tokens
            if self._is_thought(delta, was_thinking):
                self.reasoning_tokens += delta.tokens
            if self.with_logprobs:
                logprobs = self._entries(delta)
                self._logprobs += logprobs
                self._unsent_logprobs += logprobs
        return [self._chunk(self._delta(piece)) for piece in pieces]

    def finish(self, done: Done) -> list[Chunk]:
        """The deltas of the text that was still held back, and at last the one with the finish reason."""
        self.done = done
        pieces = self._placed([*self.parser.finish(stopped=done.reason == "stop"), None])
        deltas = [self._delta(piece) for piece in pieces]
        return [*(self._chunk(delta) for delta in deltas), self._chunk({}, self.finish_reason)]

    def _pieces(self, delta: Delta) -> list[Piece]:
        return self.parser.feed(delta.text)

    def _is_thought(self, delta: Delta, was_thinking: bool) -> bool:
        return was_thinking or self.parser.thinking

    def _entries(self, delta: Delta) -> list[dict[str, Any]]:
        return [self._logprob_entry(logprob) for logprob in delta.logprobs]

    @property
    def finish_reason(self) -> str:
        assert self.done is not None
        return "tool_calls" if self._tool_calls and self.done.reason == "stop" else self.done.reason.value

    def body(self) -> Chunk:
        message: dict[str, Any] = {"role": "assistant", "content": self._text["content"], "refusal": None}
        if self._text["reasoning"]:
            message |= {"reasoning_content": self._text["reasoning"], "reasoning": self._text["reasoning"]}
        if self._tool_calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self._tool_calls]
            message["content"] = message["content"] or None
        if self._boxes:
            message["boxes"] = self._boxes
        logprobs = {"content": self._logprobs, "refusal": None} if self.with_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _placed(self, pieces: Sequence[Piece | None]) -> list[Piece]:
        """The pieces with their reasoning where it is wanted; None stands for the end of the answer."""
        if self.reasoning_place == "separate":
            return [piece for piece in pieces if piece is not None]
        if self.reasoning_place == "nowhere":
            return [piece for piece in pieces if piece is not None and not isinstance(piece, Reasoning)]
        placed: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Reasoning) != self._inside_reasoning:
                placed.append(Content(f"{END_THINK}\n" if self._inside_reasoning else THINK))
                self._inside_reasoning = not self._inside_reasoning
            if piece is not None:
                placed.append(Content(piece.text) if isinstance(piece, Reasoning) else piece)
        return placed

    @property
    def json_text(self) -> str:
        """The finished answer if it is the JSON that was asked for; empty for calls and for a text that was cut off."""
        finished = self.done is not None and self.done.reason == "stop" and not self._tool_calls
        return self._text["content"].rpartition(END_THINK)[2] if finished else ""

    def opening(self) -> Chunk:
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> Chunk:
        logprobs = None
        if self._unsent_logprobs:
            logprobs = {"content": self._unsent_logprobs, "refusal": None}
            self._unsent_logprobs = []
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case Reasoning(text):
                self._text["reasoning"] += text
                return {"reasoning_content": text, "reasoning": text}
            case Content(text):
                self._text["content"] += text
                return {"content": text}
            case Boxes(regions):
                prompt = self.prompt
                boxes = [region_entry(region, prompt.image_sizes, prompt.question_image) for region in regions]
                self._boxes += boxes
                return {"boxes": boxes}
            case Call(name, arguments):
                index = len(self._tool_calls)
                function = {"name": name, "arguments": arguments}
                call = {"index": index, "id": f"{self.call_id}_{index}", "type": "function", "function": function}
                self._tool_calls.append(call)
                return {"tool_calls": [call]}

    def _logprob_entry(self, logprob: TokenLogprob) -> dict[str, Any]:
        top = [self._token_entry(token, value) for token, value in logprob.top]
        return {**self._token_entry(logprob.token_id, logprob.logprob), "top_logprobs": top}

    def _token_entry(self, token: int, logprob: float) -> dict[str, Any]:
        assert self.vocabulary is not None
        data = self.vocabulary.token_bytes(token)
        # JSON has no minus infinity.
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def _append(pieces: list[Piece], piece: Piece) -> None:
    last = pieces[-1] if pieces else None
    if isinstance(piece, Content) and isinstance(last, Content):
        pieces[-1] = Content(last.text + piece.text)
    elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
        pieces[-1] = Reasoning(last.text + piece.text)
    else:
        pieces.append(piece)


@dataclass
class Completion:
    """The answer to one request: its choices and what they share. Used in the event loop only."""

    id: str
    request_id: str
    model: str
    prompt: PromptFacts
    choices: list[Choice]
    arrived_at: float  # monotonic
    preprocess_s: float
    prompts: int = 1  # of a text completion, each with as many choices
    ignored: list[str] = field(default_factory=list)  # fields of the request that had no effect
    checked_schema: dict[str, Any] | None = None  # the finished answers are checked against it
    unmet: list[str] = field(default_factory=list)  # what they do not fit of it
    created: int = field(default_factory=lambda: int(time.time()))
    first_token_at: float | None = None

    def feed(self, index: int, deltas: list[Delta]) -> list[Chunk]:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        return [self.chunk(part) for part in self.choices[index].feed(deltas)]

    def finish(self, index: int, done: Done) -> list[Chunk]:
        *chunks, last = [self.chunk(part) for part in self.choices[index].finish(done)]
        if self.finished:
            last |= {"timings": self.timings(), **self._ignored()}
        return [*chunks, last]

    @property
    def finished(self) -> bool:
        return all(choice.done for choice in self.choices)

    def opening(self) -> list[Chunk]:
        return [self.chunk(choice.opening()) for choice in self.choices]

    def chunk(self, part: Chunk) -> Chunk:
        return {**self._head("chat.completion.chunk"), "choices": [part]}

    def usage_chunk(self) -> Chunk:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(), **self._ignored()}

    def body(self) -> dict[str, Any]:
        choices = [choice.body() for choice in self.choices]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": self.usage(),
            "timings": self.timings(),
            **self._ignored(),
        }

    def usage_so_far(self) -> dict[str, int]:
        """While the answer is written; the cached tokens are known at its end only."""
        prompt_tokens, completion_tokens = self.prompt.tokens, sum(choice.tokens for choice in self.choices)
        total = prompt_tokens + completion_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    def usage(self) -> dict[str, Any]:
        done = self._done()
        of_prompts = done[:: max(1, len(self.choices) // self.prompts)]
        prompt_tokens = sum(d.prompt_tokens for d in of_prompts)
        completion_tokens = sum(d.completion_tokens for d in done)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(d.cached_tokens for d in of_prompts),
                "image_tokens": self.prompt.image_tokens,
            },
            "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in self.choices)},
        }

    def timings(self) -> dict[str, float]:
        """Seconds, and tokens per second. Of several choices the slowest counts."""
        done = self._done()
        now = time.monotonic()
        after_first = [
            (d.completion_tokens - 1, d.decode_s) for d in done if d.completion_tokens > 1 and d.decode_s > 0
        ]
        per_token = max((seconds / tokens for tokens, seconds in after_first), default=0.0)
        rate = sum(tokens / seconds for tokens, seconds in after_first)
        times = {
            "queue_s": max(d.queue_s for d in done),
            "preprocess_s": self.preprocess_s,
            "prefill_s": max(d.prefill_s for d in done),
            "vision_s": max(d.vision_s for d in done),
            "decode_s": max(d.decode_s for d in done),
            "ttft_s": (self.first_token_at or now) - self.arrived_at,
            "tpot_s": per_token,
            "total_s": now - self.arrived_at,
        }
        return {**{name: round(value, 4) for name, value in times.items()}, "tokens_per_s": round(rate, 2)}

    def _done(self) -> list[Done]:
        return [choice.done for choice in self.choices if choice.done is not None]

    def _ignored(self) -> Chunk:
        """What was not kept of the request: its fields without effect, and what the answer does not fit of its schema."""
        notes = {"ignored": self.ignored, "unmet": self.unmet}
        return {name: names for name, names in notes.items() if names}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "request_id": self.request_id,
        }


class ServerSentEvent(NamedTuple):
    name: str | None
    data: Any  # a string is sent as it is, anything else as JSON

    def encode(self) -> bytes:
        """The bytes of the event on the wire (WHATWG HTML, section "Server-sent events")."""
        if isinstance(self.data, str):
            return format_sse_event(data_str=self.data, event=self.name)
        name = "" if self.name is None else f"event: {self.name}\n"
        return f"{name}data: {_JSON.encode(self.data)}\n\n".encode()  # JSON has no line breaks


class ResponseFormatter(Protocol):
    """Writes one answer in a wire format: as events while it streams, or as one body after `closing`.

    A body is formatted through the same calls, its events dropped, so that both have the same content.
    """

    def opening(self) -> list[ServerSentEvent]: ...

    def format(self, chunk: Chunk) -> list[ServerSentEvent]: ...

    def closing(self) -> list[ServerSentEvent]: ...

    def failed(self, error: ServingError) -> ServerSentEvent: ...

    def body(self) -> dict[str, Any]: ...


class ChatFormatter:
    """Chat completions: their chunks are the events.

    `include_usage`: the usage is the last event. `continuous_usage`: every chunk has the usage so far.
    `uses_functions`: calls have the form that they had before there were `tools`.
    """

    def __init__(
        self,
        completion: Completion,
        include_usage: bool = False,
        continuous_usage: bool = False,
        uses_functions: bool = False,
    ) -> None:
        self._completion = completion
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._uses_functions = uses_functions

    def opening(self) -> list[ServerSentEvent]:
        return [event for chunk in self._completion.opening() for event in self.format(chunk)]

    def format(self, chunk: Chunk) -> list[ServerSentEvent]:
        if self._uses_functions:
            chunk = {**chunk, "choices": [_with_function_call(choice, "delta") for choice in chunk["choices"]]}
        if self._continuous_usage:
            chunk = {**chunk, "usage": self._completion.usage_so_far()}
        return [ServerSentEvent(None, chunk)]

    def closing(self) -> list[ServerSentEvent]:
        usage = [ServerSentEvent(None, self._completion.usage_chunk())] if self._include_usage else []
        return [*usage, ServerSentEvent(None, "[DONE]")]

    def failed(self, error: ServingError) -> ServerSentEvent:
        return ServerSentEvent(None, error.body())

    def body(self) -> dict[str, Any]:
        body = self._completion.body()
        if self._uses_functions:
            body["choices"] = [_with_function_call(choice, "message") for choice in body["choices"]]
        return body


def _with_function_call(choice: Chunk, name: str) -> Chunk:
    """A choice whose call, in its `message` or `delta`, is a `function_call`."""
    inner, reason = choice[name], choice["finish_reason"]
    if "tool_calls" in inner:
        rest = {key: value for key, value in inner.items() if key != "tool_calls"}
        inner = {**rest, "function_call": inner["tool_calls"][0]["function"]}
    return {**choice, name: inner, "finish_reason": "function_call" if reason == "tool_calls" else reason}
