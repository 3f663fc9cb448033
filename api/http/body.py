"""Reads a request's body within its limit, and notices when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

from starlette.requests import Request

from api.errors import invalid, too_large, too_slow
from api.state import Services, caller

T = TypeVar("T")

BODY_S = 60.0
LARGE_BODY = 64 * 1024


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def read_body(request: Request, server: Services) -> bytes:
    """The body, which holds memory but no place while it comes in. Raises ServingError or ClientGone."""
    limit = server.settings.max_body_bytes
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdigit() else 0
    body = bytearray()
    more = True
    with server.admission.arriving(caller(request)) as arriving:
        try:
            async with asyncio.timeout(BODY_S):
                while more and size <= limit:
                    chunk, more = await _next_chunk(request)
                    size = max(size, len(body) + len(chunk))
                    if size <= limit:
                        arriving.add(len(chunk))
                        body += chunk
        except TimeoutError:
            raise too_slow(BODY_S) from None
    if size > limit:
        raise too_large(f"The body must be <= {limit} bytes. Given: {size} or more", code="body_too_large")
    if not body:
        raise invalid("The body is empty; it must be a JSON object.", code="invalid_json")
    return bytes(body)


async def parsed(parse: Callable[[bytes], T], body: bytes, pool: Executor) -> T:
    """A large body beside the event loop."""
    if len(body) <= LARGE_BODY:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(pool, parse, body)


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


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
