"""Formats an answer for /v1/responses, as one body or as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from api.errors import ServingError
from api.protocol.completion import Chunk, Completion, ServerSentEvent
from api.protocol.responses import ResponseRequest


class ResponsesFormatter:
    """Writes the items of the output: each is opened, filled and closed before the next. Implements ResponseFormatter."""

    def __init__(
        self, request: ResponseRequest, completion: Completion, functions: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        """`functions`: namespace and name of each function that is in a namespace, by its full name."""
        self._request = request
        self._functions = functions or {}
        self._completion = completion
        self._output: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._sent = 0

    def opening(self) -> list[ServerSentEvent]:
        return [self._event("created", response=self.body()), self._event("in_progress", response=self.body())]

    def format(self, chunk: Chunk) -> list[ServerSentEvent]:
        delta = chunk["choices"][0]["delta"]
        events: list[ServerSentEvent] = []
        if text := delta.get("reasoning"):
            events += self._text("reasoning", text)
        if text := delta.get("content"):
            events += self._text("message", text, chunk["choices"][0]["logprobs"])
        self._boxes += delta.get("boxes", [])
        for call in delta.get("tool_calls", []):
            events += self._call(call)
        return events

    def closing(self) -> list[ServerSentEvent]:
        events = self._close()
        if not any(item["type"] != "reasoning" for item in self._output):
            events += [*self._text("message", ""), *self._close()]
        return [
            *events,
            self._event("completed" if self._status == "completed" else "incomplete", response=self.body()),
        ]

    def failed(self, error: ServingError) -> ServerSentEvent:
        fields = error.body()["error"]
        # OpenAI's client raises on `error`; others read the fields beside it.
        return ServerSentEvent("error", {**fields, "type": "error", "error": fields, "sequence_number": self._sent})

    def body(self) -> dict[str, Any]:
        completion, request = self._completion, self._request
        done = completion.finished
        tokens = completion.usage() if done else None
        incomplete = None
        if self._status == "incomplete":
            reason = completion.choices[0].finish_reason
            incomplete = {"reason": "max_output_tokens" if reason == "length" else reason}
        return {
            "id": f"resp_{completion.id}", "object": "response", "created_at": completion.created,
            "status": self._status, "model": completion.model, "request_id": completion.request_id,
            "error": None, "incomplete_details": incomplete, "instructions": request.instructions,
            "metadata": request.metadata or {}, "background": False, "truncation": "disabled",
            "max_output_tokens": request.max_output_tokens, "temperature": request.temperature, "top_p": request.top_p,
            "parallel_tool_calls": request.parallel_tool_calls is not False, "tool_choice": request.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in request.tools or []], "store": False,
            "output": list(self._output),
            **({"boxes": self._boxes} if self._boxes else {}),
            "usage": tokens and {
                "input_tokens": tokens["prompt_tokens"],
                "input_tokens_details": tokens["prompt_tokens_details"],
                "output_tokens": tokens["completion_tokens"],
                "output_tokens_details": tokens["completion_tokens_details"],
                "total_tokens": tokens["total_tokens"],
            },
            **({"timings": completion.timings()} if done else {}),
            **({"ignored": completion.ignored} if done and completion.ignored else {}),
        }  # fmt: skip

    @property
    def _status(self) -> str:
        if not self._completion.finished:
            return "in_progress"
        return "completed" if self._completion.choices[0].finish_reason in ("stop", "tool_calls") else "incomplete"

    def _text(self, kind: str, text: str, logprobs: Any = None) -> Iterator[ServerSentEvent]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            part = _part(kind, "")
            item: dict[str, Any] = {"type": kind, "id": self._id(kind), "status": "in_progress", "content": [part]}
            name, value = ("role", "assistant") if kind == "message" else ("summary", [])
            item[name] = value
            self._open = item
            self._output.append(item)
            yield self._of_item("output_item.added", item={**item, "content": []})
            yield self._of_part("content_part.added", part=dict(part))
        self._open["content"][0]["text"] += text
        if text:
            added: dict[str, Any] = {"logprobs": (logprobs or {}).get("content", [])} if kind == "message" else {}
            if kind == "message":
                self._open["content"][0]["logprobs"] += added["logprobs"]
            yield self._of_part(f"{_part(kind, '')['type']}.delta", delta=text, **added)

    def _call(self, call: dict[str, Any]) -> Iterator[ServerSentEvent]:
        yield from self._close()
        function = call["function"]
        if function["name"] in self._functions:
            namespace, name = self._functions[function["name"]]
            function = {**function, "namespace": namespace, "name": name}
        item = {
            "type": "function_call",
            "id": self._id("call"),
            "status": "in_progress",
            "call_id": call["id"],
            **function,
        }
        self._output.append(item)
        arguments, ids = function["arguments"], {"item_id": item["id"]}
        yield self._of_item("output_item.added", item={**item, "arguments": ""})
        yield self._of_item("function_call_arguments.delta", **ids, delta=arguments)
        yield self._of_item("function_call_arguments.done", **ids, name=function["name"], arguments=arguments)
        item["status"] = "completed"
        yield self._of_item("output_item.done", item=dict(item))

    def _close(self) -> list[ServerSentEvent]:
        item = self._open
        if item is None:
            return []
        item["status"] = "completed" if self._status == "in_progress" else self._status
        part = item["content"][0]
        logprobs: dict[str, Any] = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        events = [
            self._of_part(f"{part['type']}.done", text=part["text"], **logprobs),
            self._of_part("content_part.done", part=dict(part)),
            self._of_item("output_item.done", item=dict(item)),
        ]
        self._open = None
        return events

    def _id(self, kind: str) -> str:
        head = {"message": "msg", "reasoning": "rs", "call": "fc"}[kind]
        return f"{head}_{self._completion.id}_{len(self._output)}"

    def _of_part(self, name: str, /, **data: Any) -> ServerSentEvent:
        return self._of_item(name, item_id=self._output[-1]["id"], content_index=0, **data)

    def _of_item(self, name: str, /, **data: Any) -> ServerSentEvent:
        return self._event(name, output_index=len(self._output) - 1, **data)

    def _event(self, name: str, /, **data: Any) -> ServerSentEvent:
        self._sent += 1
        body = {"type": f"response.{name}", "sequence_number": self._sent - 1, **data}
        return ServerSentEvent(f"response.{name}", body)


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
