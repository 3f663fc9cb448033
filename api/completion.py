"""Engine events to OpenAI's words: deltas while it streams, the message, usage and timings at the end.

The message is assembled from the very deltas that a stream sends, so both say the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from api.engine.request import Delta, Done
from api.output import Boxes, Call, Content, OutputParser, Piece, Reasoning
from api.prompt import Prompt


@dataclass
class Completion:
    id: str
    model: str
    prompt: Prompt
    parser: OutputParser
    arrived_at: float  # monotonic
    preprocess_s: float
    created: int = field(default_factory=lambda: int(time.time()))
    first_token_at: float | None = None
    _reasoning_tokens: int = 0
    _boxes: list[dict[str, Any]] = field(default_factory=list)
    _tool_calls: list[dict[str, Any]] = field(default_factory=list)
    _text: dict[str, str] = field(default_factory=lambda: {"content": "", "reasoning": ""})

    def feed(self, delta: Delta) -> list[dict[str, Any]]:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        was_thinking = self.parser.thinking
        pieces = self.parser.feed(delta.text)
        if was_thinking or self.parser.thinking:
            self._reasoning_tokens += delta.tokens
        return [self._delta(piece) for piece in pieces]

    def finish(self, done: Done) -> list[dict[str, Any]]:
        return [self._delta(piece) for piece in self.parser.finish(stopped=done.reason == "stop")]

    def finish_reason(self, done: Done) -> str:
        return "tool_calls" if self._tool_calls and done.reason == "stop" else done.reason.value

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last_chunk(self, done: Done) -> dict[str, Any]:
        return {**self.chunk({}, self.finish_reason(done)), "timings": self.timings(done)}

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(done)}

    def body(self, done: Done) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._text["content"], "refusal": None}
        if self._text["reasoning"]:
            message |= {"reasoning_content": self._text["reasoning"], "reasoning": self._text["reasoning"]}
        if self._tool_calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self._tool_calls]
            message["content"] = message["content"] or None
        if self._boxes:
            message["boxes"] = self._boxes
        reason = self.finish_reason(done)
        return {
            **self._head("chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
            "usage": self.usage(done),
            "timings": self.timings(done),
        }

    def usage(self, done: Done) -> dict[str, Any]:
        return {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "total_tokens": done.prompt_tokens + done.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens, "image_tokens": self.prompt.image_tokens},
            "completion_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
        }

    def timings(self, done: Done) -> dict[str, float]:
        now = time.monotonic()
        after_first = done.completion_tokens - 1
        rate = after_first / done.decode_s if after_first > 0 and done.decode_s > 0 else 0.0
        return {
            "queue_s": round(done.queue_s, 4),
            "preprocess_s": round(self.preprocess_s, 4),
            "ttft_s": round((self.first_token_at or now) - self.arrived_at, 4),
            "total_s": round(now - self.arrived_at, 4),
            "tokens_per_s": round(rate, 2),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case Reasoning(text):
                self._text["reasoning"] += text
                return {"reasoning_content": text, "reasoning": text}
            case Content(text):
                self._text["content"] += text
                return {"content": text}
            case Boxes(rectangles):
                boxes = [self._box(rectangle) for rectangle in rectangles]
                self._boxes += boxes
                return {"boxes": boxes}
            case Call(name, arguments):
                index = len(self._tool_calls)
                function = {"name": name, "arguments": arguments}
                call = {"index": index, "id": f"call_{self.id}_{index}", "type": "function", "function": function}
                self._tool_calls.append(call)
                return {"tool_calls": [call]}

    def _box(self, rectangle: tuple[int, int, int, int]) -> dict[str, Any]:
        """The model does not say which picture it means; the last one is what people ask about."""
        box: dict[str, Any] = {"bbox_2d": list(rectangle)}
        if self.prompt.picture_sizes:
            width, height = self.prompt.picture_sizes[-1]
            sides = (width, height, width, height)
            box["bbox_pixels"] = [round(v * side / 1000) for v, side in zip(rectangle, sides, strict=True)]
            box["image"] = len(self.prompt.picture_sizes) - 1
        return box
