"""Formats an answer for /v1/messages, as one body or as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from api.errors import ServingError, anthropic_body
from api.protocol.completion import Chunk, Completion, ServerSentEvent

_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "repetition": "max_tokens"}


class MessagesFormatter:
    """Writes content blocks: each is opened, filled and closed before the next. Implements ResponseFormatter."""

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        self._blocks: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def opening(self) -> list[ServerSentEvent]:
        return [_event("message_start", message=self.body()), _event("ping")]

    def format(self, chunk: Chunk) -> list[ServerSentEvent]:
        delta = chunk["choices"][0]["delta"]
        events: list[ServerSentEvent] = []
        if text := delta.get("reasoning"):
            events += self._text("thinking", text)
        if text := delta.get("content"):
            events += self._text("text", text)
        self._boxes += delta.get("boxes", [])
        for call in delta.get("tool_calls", []):
            events += self._call(call)
        return events

    def closing(self) -> list[ServerSentEvent]:
        events = self._close()
        if not any(block["type"] != "thinking" for block in self._blocks):
            events += [*self._text("text", ""), *self._close()]
        body = self.body()
        delta = {"stop_reason": body["stop_reason"], "stop_sequence": body["stop_sequence"]}
        added = {name: body[name] for name in ("boxes", "timings", "ignored") if name in body}
        return [*events, _event("message_delta", delta=delta, usage=body["usage"], **added), _event("message_stop")]

    def failed(self, error: ServingError) -> ServerSentEvent:
        return ServerSentEvent("error", anthropic_body(error))

    def body(self) -> dict[str, Any]:
        completion = self._completion
        reason, stop_string = None, None
        if completion.finished:
            [choice] = completion.choices
            reason = _STOP_REASONS[choice.finish_reason]
            stop_string = choice.done.stop_string if choice.done is not None else None
            if stop_string is not None and reason == "end_turn":
                reason = "stop_sequence"
        return {
            "id": f"msg_{completion.id}", "type": "message", "role": "assistant", "model": completion.model,
            "content": [dict(block) for block in self._blocks], "stop_reason": reason, "stop_sequence": stop_string,
            "usage": self._usage(),
            **({"boxes": self._boxes} if self._boxes else {}),
            **({"timings": completion.timings()} if completion.finished else {}),
            **({"ignored": completion.ignored} if completion.finished and completion.ignored else {}),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts cached tokens beside the others. Until the end it is not known which were cached."""
        prompt, cached, written = self._completion.prompt.tokens, 0, 0
        if self._completion.finished:
            usage = self._completion.usage()
            prompt, written = usage["prompt_tokens"], usage["completion_tokens"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": prompt - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
            "output_tokens": written,
        }  # fmt: skip

    def _text(self, kind: str, text: str) -> Iterator[ServerSentEvent]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            self._open = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
            self._blocks.append(self._open)
            yield self._of_block("content_block_start", content_block=dict(self._open))
        self._open[kind] += text
        if text:
            yield self._of_block("content_block_delta", delta={"type": f"{kind}_delta", kind: text})

    def _call(self, call: dict[str, Any]) -> Iterator[ServerSentEvent]:
        yield from self._close()
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        block: dict[str, Any] = {"type": "tool_use", "id": call["id"], "name": name, "input": json.loads(arguments)}
        self._blocks.append(block)
        yield self._of_block("content_block_start", content_block={**block, "input": {}})
        yield self._of_block("content_block_delta", delta={"type": "input_json_delta", "partial_json": arguments})
        yield self._of_block("content_block_stop")

    def _close(self) -> list[ServerSentEvent]:
        block, self._open = self._open, None
        if block is None:
            return []
        events = []
        if block["type"] == "thinking":
            # Clients send only signed reasoning back. Here nothing depends on the signature, and it is not checked.
            block["signature"] = self._completion.id
            delta = {"type": "signature_delta", "signature": block["signature"]}
            events.append(self._of_block("content_block_delta", delta=delta))
        return [*events, self._of_block("content_block_stop")]

    def _of_block(self, name: str, **data: Any) -> ServerSentEvent:
        return _event(name, index=len(self._blocks) - 1, **data)


def _event(name: str, **data: Any) -> ServerSentEvent:
    return ServerSentEvent(name, {"type": name, **data})
