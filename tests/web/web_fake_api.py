"""A small real HTTP server with the API's contract, controlled by the test.

It records every chat request and when its client disconnected, so that tests can assert on the server's side.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

INFO: dict[str, Any] = {
    "name": "glm-4.6v-flash-web",
    "model": "glm-shapes-demo",
    "demo": True,
    "knows": {"en": "It knows coloured shapes and printed words.", "zh": "它认识彩色图形和印刷文字。"},
    "context_tokens": 8192,
    "device": "cpu",
    "dtype": "bfloat16",
    "limits": {"max_images": 4, "max_image_bytes": 2 * 2**20, "max_image_pixels": 50_000_000, "default_max_tokens": 256, "fetch_images": True},
    "generation": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    "slots": 16,
    "kv_cache_tokens": 69632,
    "choices": {"slots": "the choice for cpu", "kv_cache": "255 MiB: enough for 8 full contexts"},
    "proofs": {"attention": "off: 2.1 ms, 1.9 ms without"},
}
HEALTH: dict[str, Any] = {"state": "idle", "progress": 1.0, "model": "glm-shapes-demo", "running": 0, "waiting": 0, "phase": "idle"}
METRICS = """# TYPE glm_kv_cache_usage_perc gauge
glm_kv_cache_usage_perc 0.25
# TYPE glm_request_time_per_output_token_seconds histogram
glm_request_time_per_output_token_seconds_count{traffic="user"} 4.0
glm_request_time_per_output_token_seconds_sum{traffic="user"} 0.1
"""


@dataclass
class Answer:
    """The response to a chat request. `pause_s`: between words; `queue`: the number of heartbeats before the first."""

    text: str = "It is a red circle."
    reasoning: str = ""
    boxes: list[dict[str, Any]] = field(default_factory=list)
    call: tuple[str, str] | None = None  # a tool's name and arguments
    pause_s: float = 0.0
    repeat_until: threading.Event | None = None  # the text is repeated until it is set; then comes `ending`
    ending: str = ""
    queue: int = 0
    queue_pause_s: float = 0.3
    head_delay_s: float = 0.0
    finish_reason: str = "stop"
    cut_after: int | None = None  # words after which the connection breaks
    error_event: dict[str, Any] | None = None
    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Received:
    body: dict[str, Any]
    headers: dict[str, str]
    words_sent: int = 0
    heartbeats_sent: int = 0
    ended: bool = False
    left_at: float | None = None  # time.monotonic() when the client disconnected


class FakeApi:
    """Use as a context manager."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.reset()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.fake = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def reset(self) -> None:
        self.info: dict[str, Any] = json.loads(json.dumps(INFO))
        self.health = dict(HEALTH)
        self.answer = Answer()
        self.received: list[Received] = []
        self.other_hits: list[str] = []

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    fake: FakeApi


class _Disconnected(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        fake = self.server.fake
        if self.path == "/health":
            ready = fake.health["state"] in ("idle", "busy")
            self._json(200 if ready else 503, fake.health)
        elif not self._allowed():
            self._json(401, {"error": {"message": "wrong key", "type": "authentication_error"}})
        elif self.path == "/info":
            self._json(200, fake.info)
        elif self.path == "/metrics":
            self._answer(200, METRICS.encode(), "text/plain; version=0.0.4")
        else:
            fake.other_hits.append(self.path)
            self._json(404, {"error": {"message": "no such route", "type": "not_found"}})

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            self._json(401, {"error": {"message": "wrong key", "type": "authentication_error"}}, {"x-request-id": "r1"})
            return
        received = Received(body, {name.lower(): value for name, value in self.headers.items()})
        fake.received.append(received)
        answer = fake.answer
        if answer.status != 200:
            self._json(answer.status, {"error": answer.error}, {"x-request-id": "req-42", **answer.headers})
            return
        try:
            self._wait(answer.head_delay_s)
            self._stream(answer, received)
        except (_Disconnected, ConnectionError):
            received.left_at = time.monotonic()
        finally:
            received.ended = True
            self.close_connection = True

    def _stream(self, answer: Answer, received: Received) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("x-request-id", "req-42")
        self.end_headers()
        for position in range(answer.queue, 0, -1):
            self._send(f": queue_position={position}\n\n")
            received.heartbeats_sent += 1
            self._wait(answer.queue_pause_s)
        for word in _words(answer.reasoning):
            self._delta({"reasoning_content": word, "reasoning": word})
            self._wait(answer.pause_s)
        for number, word in enumerate(self._words_of(answer)):
            if answer.cut_after == number:
                return
            self._delta({"content": word})
            received.words_sent += 1
            self._wait(answer.pause_s)
        if answer.error_event is not None:
            self._data({"error": answer.error_event})
            self._send("", last=True)
            return
        for box in answer.boxes:
            self._delta({"boxes": [box]})
        if answer.call is not None:
            name, arguments = answer.call
            self._delta({"tool_calls": [{"index": 0, "id": "call-7", "type": "function", "function": {"name": name, "arguments": ""}}]})
            self._delta({"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]})
        timings = {"ttft_s": 0.25, "total_s": 1.0, "tokens_per_s": 40.0}
        self._data({"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish_reason}], "timings": timings})
        self._data({"choices": [], "usage": {"prompt_tokens": 90, "completion_tokens": 7, "total_tokens": 97}})
        self._send("data: [DONE]\n\n")
        self._send("", last=True)

    def _words_of(self, answer: Answer) -> Iterator[str]:
        yield from _words(answer.text)
        while answer.repeat_until and not answer.repeat_until.is_set():
            yield from _words(answer.text)
        yield from _words(answer.ending)

    def _delta(self, delta: dict[str, Any]) -> None:
        self._data({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def _data(self, chunk: dict[str, Any]) -> None:
        self._send(f"data: {json.dumps(chunk)}\n\n")

    def _send(self, text: str, last: bool = False) -> None:
        data = text.encode()
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if last:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _wait(self, seconds: float) -> None:
        """Pause, but notice a disconnect within 20 ms."""
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            readable, _, _ = select.select([self.connection], [], [], max(0.0, min(left, 0.02)))
            if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise _Disconnected
            if left <= 0:
                return

    def _allowed(self) -> bool:
        key = self.server.fake.key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(body).encode(), "application/json", headers)

    def _answer(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _words(text: str) -> list[str]:
    return [word + " " for word in text.split(" ")] if text else []
