"""One client's connection: its time limits, reading its body, detecting its disconnect, and sending events.

uvicorn limits how long a connection may be idle, but not how slowly headers may arrive or an answer may be read.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from typing import ClassVar, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import invalid, too_large, too_slow

T = TypeVar("T")

HEADERS_S = 10.0  # from opening a connection, or the first byte after an answer, to the end of a request's headers
BODY_S = 60.0
SEND_S = 30.0  # a client that reads nothing for so long counts as disconnected
MOST_WAITING = 4096  # connections without a request under way
SPARE_FILES = 768  # descriptors kept free of waiting connections, for files and for a burst of new connections
LARGE_BODY_BYTES = 64 * 1024
# How much of a body is read and discarded after an early answer, and for how long.
LINGER_S = 10.0
LINGER_BYTES = 256 * 2**20
_NO_HEADERS: Mapping[str, str] = {}


class ClientDisconnected(Exception):
    """The client has closed the connection, so no answer can be sent."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a time limit on a request's headers, and a limit on the connections that wait.

    Without them a client could hold any number of file descriptors, by sending nothing or a byte now and then, and needs
    no key. Beyond the limit, or when descriptors run short, a new connection ends the one that has waited longest.
    """

    _timer: asyncio.TimerHandle | None = None
    _waiting: ClassVar[dict[Connection, None]] = {}  # oldest first

    @classmethod
    def close_oldest(cls) -> None:
        """Closes the connection that has waited longest for the headers of a request, if any."""
        for oldest in cls._waiting:
            oldest._cancel_timer()
            oldest.transport.abort()
            return

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_timer()
        if len(self._waiting) > MOST_WAITING or _descriptors_are_short(transport.get_extra_info("socket").fileno()):
            self.close_oldest()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        """A kept connection waits too, as long as uvicorn lets it, and may be ended for a new one."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._waiting[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def _update_timer(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self.transport.close)
            self._waiting[self] = None

    def _cancel_timer(self) -> None:
        self._waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _descriptors_are_short(newest: int) -> bool:
    """`newest` is the number of a new descriptor: the kernel gives the lowest free one, so all below it are in use."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit != resource.RLIM_INFINITY and newest >= limit - min(SPARE_FILES, limit // 4)


async def read_body(request: Request, max_bytes: int, on_bytes: Callable[[int], None]) -> bytes:
    """The body. `on_bytes` is called with the size of each piece before it is stored, and may raise a ServingError.

    Raises ServingError (408 too slow, 413 larger than `max_bytes`, 400 empty) or ClientDisconnected.
    """
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdigit() else 0
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(BODY_S):
            while more and size <= max_bytes:
                chunk, more = await _next_chunk(request)
                size = max(size, len(body) + len(chunk))
                if size <= max_bytes:
                    on_bytes(len(chunk))
                    body += chunk
    except TimeoutError:
        raise too_slow(BODY_S) from None
    if size > max_bytes:
        raise too_large(f"The body must be <= {max_bytes} bytes. Given: {size} or more", code="body_too_large")
    if not body:
        raise invalid("The body is empty; it must be a JSON object.", code="invalid_json")
    return bytes(body)


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnected
    return message.get("body", b""), message.get("more_body", False)


async def parse_body(parse: Callable[[bytes], T], body: bytes, pool: Executor) -> T:
    """`parse(body)`; a large body is parsed in `pool`, so that it does not block the event loop."""
    if len(body) <= LARGE_BODY_BYTES:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(pool, parse, body)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; if the client disconnects first, cancel it and raise ClientDisconnected.

    The body must have been read: whatever arrives now is discarded.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A response of encoded server-sent events; `close` is called when it ends, however it ends.

    starlette cancels the stream as soon as the client disconnects, which may be before the first byte.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], None], headers: Mapping[str, str] = _NO_HEADERS
    ) -> None:
        # The second header keeps nginx from buffering the stream.
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnected from None

        try:
            with suppress(ClientDisconnected):
                await super().__call__(scope, receive, send_in_time)
        finally:
            self._close()
            await self._events.aclose()


class LingerMiddleware:
    """Sends an early answer at once, then reads and discards the rest of the body for a while.

    A request refused for its key, path or a limit is answered before its body has arrived. Closing the connection
    while the client still sends would reset it, and the client could lose the answer (nginx: `lingering_close`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _has_body(headers := Headers(scope=scope)):
            await _Exchange(receive, send, _framed_twice(headers)).run(self._app, scope)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    def __init__(self, receive: Receive, send: Send, closes: bool) -> None:
        self._receive = receive
        self._send = send
        self._closes = closes
        self._arriving = True
        self._end_pending = False  # the last message of the answer is held back, since it closes the connection

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        await app(scope, self.receive, self.send)
        if self._end_pending:
            await self._discard()
            await self._send({"type": "http.response.body", "body": b""})

    async def receive(self) -> Message:
        message = await self._receive()
        self._arriving = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if (self._arriving or self._closes) and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"  # the rest of the body would be parsed as a request
        if self._arriving and message["type"] == "http.response.body" and not message.get("more_body", False):
            message, self._end_pending = {**message, "more_body": True}, True
        await self._send(message)

    async def _discard(self) -> None:
        remaining = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._arriving and remaining > 0:
                    remaining -= len((await self.receive()).get("body", b""))


def _framed_twice(headers: Headers) -> bool:
    """Two announcements of a body's end, of which a proxy may believe the other one: what follows is not trusted (RFC 9112)."""
    return "content-length" in headers and "transfer-encoding" in headers


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
