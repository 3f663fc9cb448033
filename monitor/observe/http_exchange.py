"""One HTTP exchange with a total deadline; used by probes, alerts, exports and start.sh.

A socket timeout restarts with every byte, so a server that trickles could hold a probe forever. Each exchange runs in a
thread; at the deadline its socket is shut down, which also makes the server cancel its work. Standard library only, and no
syntax newer than Python 3.8, because stop.sh imports this through deploy/service.py with any Python it finds.
"""

from __future__ import annotations

import contextlib
import errno
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
NO_FILES = "the checker itself may not open more files"
BODY_LIMIT_BYTES = 2**20
STREAM_LIMIT_BYTES = 8 * 2**20
LINE_LIMIT_BYTES = 256 * 1024
Result = TypeVar("Result")


@dataclass
class ConnectionHandle:
    """The connection of an exchange, which another thread may close."""

    connection: http.client.HTTPConnection | None = None
    closed: bool = False

    def close(self) -> None:
        self.closed = True
        if self.connection is not None and self.connection.sock is not None:
            with contextlib.suppress(OSError):
                self.connection.sock.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Reply:
    """`outcome`: answered, refused (nothing listens), silent (no answer by the deadline), failed."""

    outcome: str
    seconds: float
    status: int = 0
    body: bytes = b""
    detail: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any] | None:
        """The body if it is a JSON object, else None."""
        try:
            parsed = parse_json(self.body)
        except ValueError:
            return None
        return parsed if isinstance(parsed, dict) else None


def parse_json(text: bytes | str) -> Any:
    """What a server sent as JSON. A lone surrogate, which no file could store, becomes a question mark. Raises ValueError."""
    try:
        parsed = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
        said = json.dumps(parsed, ensure_ascii=False)
        storable = said.encode("utf-8", "replace").decode("utf-8")
        return parsed if storable == said else json.loads(storable)
    except RecursionError:  # a body of brackets only
        raise ValueError("too many brackets") from None


class Deadline(Generic[Result]):
    """Runs a function in a daemon thread; `result` waits for it, but not beyond `limit_s` after the construction.

    At the deadline `result` returns `on_timeout` and calls `cancel`, which should make the function return. An exception
    of the function is raised by `result`.
    """

    def __init__(
        self, function: Callable[[], Result], limit_s: float, on_timeout: Result, cancel: Callable[[], None] | None = None
    ) -> None:
        self._result = on_timeout
        self._error: Exception | None = None
        self._ends_at = time.monotonic() + limit_s
        self._cancel = cancel
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Result]) -> None:
        try:
            result = function()
            if not self._done.is_set():
                self._result = result
        except Exception as error:  # raised again by `result`
            self._error = error
        self._done.set()

    def result(self) -> Result:
        in_time = self._done.wait(max(0.0, self._ends_at - time.monotonic()))
        self._done.set()
        if not in_time and self._cancel is not None:
            self._cancel()
        elif self._error is not None:
            raise self._error
        return self._result


def exchange(
    url: str, limit_s: float, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None,
    connect_s: float = CONNECT_LIMIT_S,
) -> Reply:  # fmt: skip
    """Never raises for what a server or network does, and uses no proxy. A body of more than BODY_LIMIT_BYTES is a failure.

    http.client limits each line of the head, and their number.
    """
    handle = ConnectionHandle()
    timeout = Reply("silent", limit_s, detail=f"no answer within {limit_s:.1f} s")

    def send() -> Reply:
        started = time.monotonic()
        try:
            with open_exchange(handle, url, limit_s, method, body, headers, connect_s) as response:
                content = response.read(BODY_LIMIT_BYTES + 1)
                if len(content) > BODY_LIMIT_BYTES:
                    raise TooLong(f"the body has more than {BODY_LIMIT_BYTES} bytes")
                return Reply("answered", seconds_since(started), response.status, content, headers=dict(response.headers.items()))
        except Exception as error:
            return failed_reply(error, started, limit_s)

    return Deadline(send, limit_s, timeout, handle.close).result()


@contextlib.contextmanager
def open_exchange(
    handle: ConnectionHandle, url: str, limit_s: float, method: str = "GET", body: bytes | None = None,
    headers: Mapping[str, str] | None = None, connect_s: float = CONNECT_LIMIT_S,
) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
    """Yields the response with its body unread. Raises OSError and HTTPException."""
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        import ssl  # stop.sh must run with a Python without it

        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=min(connect_s, limit_s), context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=min(connect_s, limit_s))
    handle.connection = connection
    try:
        connection.connect()
        connection.sock.settimeout(limit_s)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path, body, {"User-Agent": "health_check", **(headers or {})})
        yield connection.getresponse()
    finally:
        connection.close()


class TooLong(Exception):
    """The server sends more than anything that it could mean."""


def bounded_lines(
    response: http.client.HTTPResponse, total_bytes: int = STREAM_LIMIT_BYTES, line_bytes: int = LINE_LIMIT_BYTES
) -> Iterator[bytes]:
    """The lines of a stream, with their ends. Raises TooLong past either limit; an HTTPResponse itself has none."""
    left = total_bytes
    while line := response.readline(min(line_bytes, left) + 1):
        left -= len(line)
        if len(line) > line_bytes:
            raise TooLong(f"a line of the stream has more than {line_bytes} bytes")
        if left < 0:
            raise TooLong(f"the stream has more than {total_bytes} bytes")
        yield line


def failed_reply(error: Exception, started: float, limit_s: float) -> Reply:
    if isinstance(error, ConnectionRefusedError):
        return Reply("refused", seconds_since(started), detail="nothing listens there")
    if isinstance(error, TimeoutError):
        return Reply("silent", seconds_since(started), detail=f"no answer within {limit_s:.1f} s")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Reply("failed", seconds_since(started), detail=NO_FILES)
    return Reply("failed", seconds_since(started), detail=f"{type(error).__name__}: {error}"[:200])


def seconds_since(started: float) -> float:
    """Seconds since `started` (CLOCK_MONOTONIC)."""
    return round(time.monotonic() - started, 3)
