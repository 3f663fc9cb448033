"""One HTTP exchange that ends at its deadline, whatever the server does: for probes, alerts, exports and start.sh alike.

A socket's own timeout starts again with every byte, so a server that trickles could hold a probe for ever. Each exchange
runs in a thread; at the deadline its socket is shut down, which also tells the server to stop working. Standard library
only and no syntax newer than Python 3.8, because stop.sh imports it through deploy/service.py with whatever Python it finds.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

CONNECT_LIMIT_S = 1.0
BODY_LIMIT_BYTES = 2**20
Result = TypeVar("Result")


@dataclass
class Wire:
    """The connection of an exchange, so that another thread can end it."""

    connection: http.client.HTTPConnection | None = None
    closed: bool = False

    def close(self) -> None:
        self.closed = True
        if self.connection is not None and self.connection.sock is not None:
            with contextlib.suppress(OSError):
                self.connection.sock.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Reply:
    """`outcome`: answered, refused (nothing listens), silent (no answer in time), failed."""

    outcome: str
    seconds: float
    status: int = 0
    body: bytes = b""
    detail: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any] | None:
        """The body if it is a JSON object, else None."""
        try:
            parsed = json.loads(self.body)
        except ValueError:
            return None
        return parsed if isinstance(parsed, dict) else None


class Deadline(Generic[Result]):
    """Runs a function in a thread of its own; `result` waits for it, but not beyond the limit.

    After the limit `result` returns `late` and calls `end`, which should make the function return.
    """

    def __init__(
        self, function: Callable[[], Result], limit_s: float, late: Result, end: Callable[[], None] | None = None
    ) -> None:
        self._result = late
        self._error: Exception | None = None
        self._ends_at = time.monotonic() + limit_s
        self._end = end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Result]) -> None:
        try:
            result = function()
            if not self._done.is_set():
                self._result = result
        except Exception as error:  # raised again in the thread that asks for the result
            self._error = error
        self._done.set()

    def result(self) -> Result:
        in_time = self._done.wait(max(0.0, self._ends_at - time.monotonic()))
        self._done.set()
        if not in_time and self._end is not None:
            self._end()
        elif self._error is not None:
            raise self._error
        return self._result


def exchange(
    url: str, limit_s: float, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None,
    connect_s: float = CONNECT_LIMIT_S,
) -> Reply:  # fmt: skip
    """Never raises for what a server or a network does. Asks no proxy."""
    wire = Wire()
    late = Reply("silent", limit_s, detail=f"no answer within {limit_s:.1f} s")

    def talk() -> Reply:
        started = time.monotonic()
        try:
            with open_exchange(wire, url, limit_s, method, body, headers, connect_s) as response:
                content = response.read(BODY_LIMIT_BYTES)
                return Reply("answered", since(started), response.status, content, headers=dict(response.headers.items()))
        except Exception as error:
            return failure(error, started, limit_s)

    return Deadline(talk, limit_s, late, wire.close).result()


@contextlib.contextmanager
def open_exchange(
    wire: Wire, url: str, limit_s: float, method: str = "GET", body: bytes | None = None,
    headers: Mapping[str, str] | None = None, connect_s: float = CONNECT_LIMIT_S,
) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
    """The response with its body still to be read."""
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        import ssl  # a Python without it can still run stop.sh

        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=min(connect_s, limit_s), context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=min(connect_s, limit_s))
    wire.connection = connection
    try:
        connection.connect()
        connection.sock.settimeout(limit_s)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path, body, {"User-Agent": "health_check", **(headers or {})})
        yield connection.getresponse()
    finally:
        connection.close()


def failure(error: Exception, started: float, limit_s: float) -> Reply:
    if isinstance(error, ConnectionRefusedError):
        return Reply("refused", since(started), detail="nothing listens there")
    if isinstance(error, TimeoutError):
        return Reply("silent", since(started), detail=f"no answer within {limit_s:.1f} s")
    return Reply("failed", since(started), detail=f"{type(error).__name__}: {error}"[:200])


def since(started: float) -> float:
    """Seconds since `started` (CLOCK_MONOTONIC)."""
    return round(time.monotonic() - started, 3)
