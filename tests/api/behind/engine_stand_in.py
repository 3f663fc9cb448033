"""A server that speaks as an engine of some kind, for the faults that no real engine makes on request.

`behave` decides what an answer is: a function that gets the handler and the body, and writes whatever it wants.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behave = Callable[["Handler", dict[str, Any]], None]
CARDS = {
    "vllm": {"id": "some-model", "object": "model", "owned_by": "vllm", "max_model_len": 2048},
    "sglang": {"id": "some-model", "object": "model", "owned_by": "sglang", "max_model_len": 4096},
    "llama.cpp": {"id": "some-model", "object": "model", "owned_by": "llamacpp", "meta": {"n_ctx_train": 65536}},
    "other": {"id": "some-model", "object": "model"},
}
PROPS = {"default_generation_settings": {"n_ctx": 1024}, "total_slots": 3}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn  # type: ignore[assignment]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(self.server.health, self.server.health_body)
        elif self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [CARDS[self.server.kind]]})
        elif self.path == "/version" and self.server.kind == "vllm":
            self.reply(200, {"version": "0.32.0"})
        elif self.path == "/props" and self.server.kind == "llama.cpp":
            self.reply(200, PROPS)
        else:
            self.reply(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path in ("/v1/chat/completions", "/v1/completions"):
            self.server.asked.append((self.path, body))
            self.server.keys.append(self.headers.get("authorization", ""))
            self.server.behave(self, body)
        elif self.path in self.server.tokenizer:
            self.server.asked.append((self.path, body))
            self.reply(200, self.server.tokenizer[self.path])
        else:
            self.reply(404, {"detail": "Not Found"})

    def reply(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def open_stream(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()

    def send(self, event: Any) -> None:
        self.wfile.write(b"data: " + (event if isinstance(event, bytes) else json.dumps(event, ensure_ascii=False).encode()) + b"\n\n")
        self.wfile.flush()


class StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, kind: str) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.kind, self.health, self.health_body = kind, 200, {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str] = []
        self.behave: Behave = says("A red circle.")
        self.tokenizer: dict[str, Any] = {}  # path of a route: its answer


@contextmanager
def engine(kind: str = "vllm", port: int = 0) -> Iterator[StandIn]:
    made = StandIn(port, kind)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()


def chunk(delta: dict[str, Any] | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, **more.pop("choice", {})}]
    return {"id": "x", "object": "chat.completion.chunk", "model": "some-model", "choices": choices, **more}


USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 4}}


def deltas(*given: dict[str, Any], reason: str = "stop") -> Behave:
    def behave(handler: Handler, body: dict[str, Any]) -> None:
        handler.open_stream()
        for delta in given:
            handler.send(chunk(delta))
        handler.send(chunk({}, reason))
        handler.send(chunk(usage=USAGE))
        handler.send(b"[DONE]")

    return behave


def says(text: str) -> Behave:
    return deltas({"role": "assistant", "content": ""}, *({"content": word} for word in text.split(" ", 1)[:1]), {"content": text[len(text.split(" ", 1)[0]) :]})
