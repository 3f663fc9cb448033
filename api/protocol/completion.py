"""Engine events to OpenAI's words: deltas while it streams, the message, usage and timings at the end.

The message is assembled from the very deltas that a stream sends, so both say the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from api.engine.request import Delta, Done, TokenLogprob
from api.engine.text.tokenizer import Vocabulary
from api.parsing.boxes import described
from api.parsing.output import Boxes, Call, Content, OutputParser, Piece, Reasoning
from api.requests.prompt import Prompt

Chunk = dict[str, Any]


@dataclass
class Choice:
    """One of the `n` answers to a request."""

    index: int
    call_id: str
    parser: OutputParser
    prompt: Prompt
    vocabulary: Vocabulary
    wants_logprobs: bool = False
    done: Done | None = None
    reasoning_tokens: int = 0
    _boxes: list[dict[str, Any]] = field(default_factory=list)
    _tool_calls: list[dict[str, Any]] = field(default_factory=list)
    _text: dict[str, str] = field(default_factory=lambda: {"content": "", "reasoning": ""})
    _logprobs: list[dict[str, Any]] = field(default_factory=list)
    _unsent_logprobs: list[dict[str, Any]] = field(default_factory=list)

    def feed(self, delta: Delta) -> list[Chunk]:
        was_thinking = self.parser.thinking
        pieces = self.parser.feed(delta.text)
        if was_thinking or self.parser.thinking:
            self.reasoning_tokens += delta.tokens
        if self.wants_logprobs:
            told = [self._token(logprob) for logprob in delta.logprobs]
            self._logprobs += told
            self._unsent_logprobs += told
        return [self._chunk(self._delta(piece)) for piece in pieces]

    def finish(self, done: Done) -> list[Chunk]:
        """What was held back, and last the reason of the end."""
        self.done = done
        pieces = self.parser.finish(stopped=done.reason == "stop")
        deltas = [self._delta(piece) for piece in pieces]
        return [*(self._chunk(delta) for delta in deltas), self._chunk({}, self.finish_reason)]

    @property
    def finish_reason(self) -> str:
        assert self.done is not None
        return "tool_calls" if self._tool_calls and self.done.reason == "stop" else self.done.reason.value

    def whole(self) -> Chunk:
        message: dict[str, Any] = {"role": "assistant", "content": self._text["content"], "refusal": None}
        if self._text["reasoning"]:
            message |= {"reasoning_content": self._text["reasoning"], "reasoning": self._text["reasoning"]}
        if self._tool_calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self._tool_calls]
            message["content"] = message["content"] or None
        if self._boxes:
            message["boxes"] = self._boxes
        logprobs = {"content": self._logprobs, "refusal": None} if self.wants_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

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
            case Boxes(places):
                boxes = [described(place, self.prompt.picture_sizes, self.prompt.asked_picture) for place in places]
                self._boxes += boxes
                return {"boxes": boxes}
            case Call(name, arguments):
                index = len(self._tool_calls)
                function = {"name": name, "arguments": arguments}
                call = {"index": index, "id": f"{self.call_id}_{index}", "type": "function", "function": function}
                self._tool_calls.append(call)
                return {"tool_calls": [call]}

    def _token(self, logprob: TokenLogprob) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in logprob.top]
        return {**self._named(logprob.token_id, logprob.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.vocabulary.token_bytes(token)
        # JSON has no minus infinity.
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


@dataclass
class Completion:
    """One request's answer: what its choices share."""

    id: str
    request_id: str
    model: str
    prompt: Prompt
    choices: list[Choice]
    arrived_at: float  # monotonic
    preprocess_s: float
    created: int = field(default_factory=lambda: int(time.time()))
    first_token_at: float | None = None

    def feed(self, index: int, delta: Delta) -> list[Chunk]:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        return [self.chunk(part) for part in self.choices[index].feed(delta)]

    def finish(self, index: int, done: Done) -> list[Chunk]:
        *chunks, last = [self.chunk(part) for part in self.choices[index].finish(done)]
        if self.finished:
            last["timings"] = self.timings()
        return [*chunks, last]

    @property
    def finished(self) -> bool:
        return all(choice.done for choice in self.choices)

    def opening(self) -> list[Chunk]:
        return [self.chunk(choice.opening()) for choice in self.choices]

    def chunk(self, part: Chunk) -> Chunk:
        return {**self._head("chat.completion.chunk"), "choices": [part]}

    def usage_chunk(self) -> Chunk:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def body(self) -> dict[str, Any]:
        choices = [choice.whole() for choice in self.choices]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": self.usage(),
            "timings": self.timings(),
        }

    def usage(self) -> dict[str, Any]:
        done = self._done()
        prompt_tokens = done[0].prompt_tokens
        completion_tokens = sum(d.completion_tokens for d in done)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": done[0].cached_tokens,
                "image_tokens": self.prompt.image_tokens,
            },
            "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in self.choices)},
        }

    def timings(self) -> dict[str, float]:
        """Seconds, and tokens in a second. Of several choices the slowest counts."""
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

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "request_id": self.request_id,
        }
