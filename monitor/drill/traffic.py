"""Users of the API, as the drill and the benchmark of legal load need them: text, large pictures, schemas, aborts.

Each stream is a thread that asks one question after another. Every request is one that the API must accept; only a refusal
for load (429, 503) is as good as an answer.
"""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from models.shapes.pictures import COLORS, draw_shapes
from monitor.observe.http_exchange import ConnectionHandle, Reply, exchange, open_exchange

PICTURE_SIZE = (4000, 3000)  # 12 megapixels
PICTURES = 4
ANSWER_LIMIT_S = 600.0
REFUSED = (429, 503)
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "seen",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"color": {"enum": sorted(COLORS)}, "count": {"type": "integer"}},
            "required": ["color", "count"],
            "additionalProperties": False,
        },
    },
}
Body = dict[str, Any]


class Traffic:
    """`outcomes` counts what the users saw: answered, refused, aborted (by themselves), or failed with the reason."""

    def __init__(self, url: str, key: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._handles: dict[int, ConnectionHandle] = {}
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []  # of each answer

    @contextmanager
    def running(self, streams: int, kinds: tuple[str, ...], pause_s: float = 0.0) -> Iterator[Traffic]:
        """`streams` users at once, the first with `kinds[0]` and so on; each waits `pause_s` after an answer."""
        make = _bodies(kinds)
        threads = [
            threading.Thread(target=self._ask_on, args=(number, kinds[number % len(kinds)], make, pause_s), daemon=True)
            for number in range(streams)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            with self._lock:
                for handle in self._handles.values():
                    handle.close()
            for thread in threads:
                thread.join(5)

    @property
    def failed(self) -> dict[str, int]:
        with self._lock:
            return {name: count for name, count in self.outcomes.items() if name.startswith("failed")}

    def summary(self) -> str:
        with self._lock:
            return ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items())) or "no request"

    def _ask_on(self, number: int, kind: str, make: Callable[[str, random.Random], Body], pause_s: float) -> None:
        rng = random.Random(f"stream {number}")
        while not self._stop.is_set():
            started = time.monotonic()
            outcome = self._ask(number, make(kind, rng), rng.randint(1, 8) if kind == "abort" else None)
            if self._stop.is_set():
                return
            with self._lock:
                self.outcomes[outcome] += 1
                if outcome == "answered":
                    self.seconds.append(round(time.monotonic() - started, 3))
            if outcome != "answered":  # as clients do that honour Retry-After
                self._stop.wait(0.5)
            self._stop.wait(pause_s)

    def _ask(self, number: int, body: Body, abort_after: int | None) -> str:
        handle = ConnectionHandle()
        with self._lock:
            self._handles[number] = handle
        try:
            with open_exchange(handle, self._url, ANSWER_LIMIT_S, "POST", json.dumps(body).encode(), self._headers, 5.0) as response:
                if response.status in REFUSED:
                    return "refused"
                if response.status != 200:
                    return f"failed: HTTP {response.status}"
                return _outcome_of(iter(lambda: response.readline(65536), b""), abort_after)
        except Exception as error:  # whatever a server that is being broken does
            return f"failed: {type(error).__name__}"


def _outcome_of(lines: Iterator[bytes], abort_after: int | None) -> str:
    for number, line in enumerate(line for line in lines if line.startswith(b"data: ")):
        if line.startswith(b"data: [DONE]"):
            return "answered"
        if line.startswith(b'data: {"error"'):
            return "failed: error event"
        if number == abort_after:
            return "aborted"
    return "failed: cut"


def send_question(url: str, key: str, limit_s: float, tokens: int = 8) -> Reply:
    """One text question, answered as a whole."""
    body = {**_text(random.Random(), tokens), "stream": False}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    return exchange(f"{url}/v1/chat/completions", limit_s, "POST", json.dumps(body).encode(), headers, connect_s=5.0)


def _bodies(kinds: tuple[str, ...]) -> Callable[[str, random.Random], Body]:
    pictures = [_jpeg(number) for number in range(PICTURES)] if {"picture", "schema"} & set(kinds) else []

    def make(kind: str, rng: random.Random) -> Body:
        if kind in ("text", "abort"):
            return _text(rng, 256 if kind == "abort" else 64)
        # Bytes behind the end of a JPEG change its hash, so that no cache knows it.
        data = rng.choice(pictures) + rng.randbytes(16)
        url = "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the picture?"}]
        return _body(content, 64) | ({"response_format": SCHEMA} if kind == "schema" else {})

    return make


def _jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    draw_shapes([(sorted(COLORS)[number % len(COLORS)], "star")], size=PICTURE_SIZE, seed=number).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _text(rng: random.Random, tokens: int) -> Body:
    return _body(f"Hello, this is user {rng.randrange(10_000)}. What can you do?", tokens)


def _body(content: object, tokens: int) -> Body:
    return {
        "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0, "stream": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
