"""A server in the place of the API or of an external engine. A program of its own, so that the kernel sees a stranger.

    python stand_in.py PORT FIRST_MODE [UPSTREAM]      prints `on` when it listens; ends with its standard input

Each line of the standard input is the next mode:

    replay FILE    /health answers that file's JSON with fresh ages of success; anything else is 404
    right          passes everything on to UPSTREAM
    hangs          /health answers, the counters stand still with a request pending, and no question is answered
    wrong          answers, with the names of colors, shapes and numbers exchanged
    slow           answers SLOW_S later than UPSTREAM
    endless        answers with one line that never ends
    failing        answers every question with 500
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import re
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SLOW_S = 4.0
LIMIT_S = 120.0
# Fast enough to exhaust a reader without bounds, and slow enough that the machine survives it.
ENDLESS_BYTES_PER_S = 100 * 2**20
PAIRS = ("red green", "blue yellow", "black white", "orange purple", "circle square", "star heart", "left right", "top bottom", "yes no")
EXCHANGED = {a: b for pair in PAIRS for a, b in (pair.split(), reversed(pair.split()))} | {str(n): str((n + 1) % 10) for n in range(10)}


class Mode:
    """What the server does now; changed by the thread that reads the standard input."""

    def __init__(self, first: str, upstream: str) -> None:
        self.upstream = upstream
        self.name, self.file = "", ""
        self.frozen = b""
        self.set(first)

    def set(self, line: str) -> None:
        self.name, _, self.file = line.strip().partition(" ")
        self.frozen = b""

    def metrics(self, headers: dict[str, str]) -> bytes:
        """The metrics as they were when they were first asked for in this mode, with one request running."""
        if not self.frozen:
            self.frozen = _pending(_upstream(self.upstream, "GET", "/metrics", None, headers)[1])
        return self.frozen


class Handler(http.server.BaseHTTPRequestHandler):
    mode: Mode

    def do_GET(self) -> None:
        mode = self.mode
        if mode.name == "replay":
            found = json.loads(Path(mode.file).read_bytes()) if self.path.startswith("/health") else {}
            found = {**found, "success_age_s": {"text": 0.4, "picture": 0.4}} if found else found
            return self._send(200 if found else 404, json.dumps(found).encode(), "application/json")
        if mode.name == "hangs" and self.path == "/health":
            return self._send(200, b"", "text/plain")
        if mode.name == "hangs" and self.path == "/metrics":
            return self._send(200, mode.metrics(self._headers_to_pass()), "text/plain")
        return self._pass_on(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = self.mode.name
        if name == "hangs":
            time.sleep(3600)
        elif name == "endless":
            self._stream_endlessly()
        elif name in ("failing", "replay"):
            self._send(500 if name == "failing" else 404, b'{"error": {"message": "stand-in"}}', "application/json")
        else:
            if name == "slow":
                time.sleep(SLOW_S)
            self._pass_on(body)

    def _pass_on(self, body: bytes | None) -> None:
        status, answer, kind = _upstream(self.mode.upstream, self.command, self.path, body, self._headers_to_pass())
        if self.mode.name == "wrong" and body is not None and status == 200:
            answer = _exchanged(answer)
        self._send(status, answer, kind)

    def _headers_to_pass(self) -> dict[str, str]:
        return {name: self.headers[name] for name in ("Authorization", "Content-Type", "X-GLM-Probe") if self.headers[name]}

    def _stream_endlessly(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: ")
        piece = b"x" * 2**20
        while True:
            self.wfile.write(piece)
            time.sleep(len(piece) / ENDLESS_BYTES_PER_S)

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the checker has given up
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    allow_reuse_address = True


def _upstream(url: str, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=LIMIT_S)
    with contextlib.closing(connection):
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(), response.headers.get("Content-Type", "text/plain")
        except (OSError, http.client.HTTPException) as error:
            return 502, json.dumps({"error": {"message": str(error)}}).encode(), "application/json"


def _pending(metrics: bytes) -> bytes:
    """The metrics with one request running."""
    return re.sub(rb"(?m)^(glm_num_requests_running) .*$", rb"\1 1.0", metrics)


def _exchanged(stream: bytes) -> bytes:
    """The same events with one piece of text, in which the names are exchanged."""
    text, frames = "", []
    for line in stream.decode("utf-8", "replace").splitlines():
        if line.startswith("data: {"):
            chunk: dict[str, Any] = json.loads(line[6:])
            text += "".join(str((choice.get("delta") or {}).get("content") or "") for choice in chunk.get("choices") or ())
            frames.append(chunk)
    words = re.sub(r"[A-Za-z]+|\d", lambda match: EXCHANGED.get(match[0].lower(), match[0]), text)
    first = next((chunk for chunk in frames if chunk.get("choices")), None)
    if first is None:
        return stream
    first["choices"][0]["delta"] = {"role": "assistant", "content": words}
    return f"data: {json.dumps(first)}\n\ndata: [DONE]\n\n".encode()


def main(arguments: list[str]) -> None:
    port, first, upstream = int(arguments[0]), arguments[1], (arguments[2:] or [""])[0]
    Handler.mode = mode = Mode(first, upstream)
    server = _bound(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"on {server.server_address[1]}", flush=True)
    for line in sys.stdin:  # its end is the end of whoever started this
        mode.set(line)
        print("done", flush=True)
    os._exit(0)


def _bound(port: int) -> Server:
    """The kernel takes a moment to free the port of a large process."""
    for _ in range(200):
        try:
            return Server(("0.0.0.0", port), Handler)
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"port {port} is in use")


if __name__ == "__main__":
    main(sys.argv[1:])
