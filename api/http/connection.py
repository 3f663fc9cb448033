"""One client's connection: time limits on what it sends and takes, its body, its end, and the answer in events.

uvicorn limits how long a connection may be idle, but not how slowly headers may arrive or an answer be taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import invalid, too_large, too_slow

T = TypeVar("T")

HEADERS_S = 10.0  # from opening a connection, or the first byte after an answer, to the end of a request's headers
BODY_S = 60.0
SEND_S = 30.0  # a client that takes nothing for so long has gone, even if its connection stands
LARGE_BODY_BYTES = 64 * 1024
LINGER_S = 10.0
LINGER_BYTES = 256 * 2**20


class ClientGone(Exception):
    """The client has closed the connection; there is no one to answer."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a time limit on a request's headers.

    Without the limit, a client without a key that sends a byte now and then holds a file descriptor for each connection.
    """

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_limit()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_limit()
        super().connection_lost(exc)

    def _update_limit(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_limit()
        elif self._limit is None:
            self._limit = self.loop.call_later(HEADERS_S, self.transport.close)

    def _cancel_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


async def read_body(request: Request, max_bytes: int, on_bytes: Callable[[int], None]) -> bytes:
    """The body. `on_bytes` is called with the size of each piece before it is kept, and may raise a ServingError.

    Raises ServingError (408 too slow, 413 larger than `max_bytes`, 400 empty) or ClientGone.
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
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


async def parse_body(parse: Callable[[bytes], T], body: bytes, pool: Executor) -> T:
    """`parse(body)`; a large body is parsed in `pool`, so that it does not block the event loop."""
    if len(body) <= LARGE_BODY_BYTES:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(pool, parse, body)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; if the client goes first, cancel it and raise ClientGone. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, already encoded; `close` is called once nothing more is sent.

    Also when the client goes before the first byte. starlette cancels the stream as soon as the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], None]) -> None:
        # The second header keeps nginx from buffering the stream.
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                raise ClientGone from None

        try:
            with suppress(ClientGone):
                await super().__call__(scope, receive, send_in_time)
        finally:
            self._close()
            await self._events.aclose()


class LingerMiddleware:
    """Answers a request whose body is still arriving at once, then reads and discards the rest for a while.

    A request refused for its key, path or a limit is answered before its body is sent. A connection closed on a client
    that still sends would be reset, and the answer lost with it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _has_body(Headers(scope=scope)):
            await _Exchange(receive, send).run(self._app, scope)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._arriving = True
        self._end_pending = False  # the last message of the answer, which closes the connection

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
        if self._arriving and message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"  # what still comes would be taken for a request
        if self._arriving and message["type"] == "http.response.body" and not message.get("more_body", False):
            message, self._end_pending = {**message, "more_body": True}, True
        await self._send(message)

    async def _discard(self) -> None:
        left = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._arriving and left > 0:
                    left -= len((await self.receive()).get("body", b""))


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
