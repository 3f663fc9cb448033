"""Reads a request's body within its limit, and notices when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

from api.admission import Admission
from api.errors import ServingError, invalid, too_large, too_slow

T = TypeVar("T")

# A client that is refused early still sends; closing on it would replace the answer by a reset.
LINGER_S = 10.0
LINGER_BYTES = 256 * 2**20
BODY_S = 60.0


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def read_body(request: Request, limit: int, admission: Admission) -> bytes:
    """The body, which holds memory but no place while it comes in. Raises ServingError or ClientGone."""
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdigit() else 0
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(BODY_S):
            while more and size <= limit:
                chunk, more = await _next_chunk(request)
                size = max(size, len(body) + len(chunk))
                if size <= limit:
                    admission.arrive(len(chunk))
                    body += chunk
    except TimeoutError:
        raise too_slow(BODY_S) from None
    except ServingError:  # there is no room for more
        admission.arrive(-len(body))
        body.clear()
        await discard_body(request)
        raise
    finally:
        admission.arrive(-len(body))
    if size > limit:
        body.clear()
        if more:
            await discard_body(request)
        raise too_large(f"The body must be <= {limit} bytes. Given: {size} or more", code="body_too_large")
    if not body:
        raise invalid("The body is empty; it must be a JSON object.", code="invalid_json")
    return bytes(body)


async def _next_chunk(request: Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


async def discard_body(request: Request) -> None:
    """Read what is still to come, for a while, without keeping anything."""
    left, more = LINGER_BYTES, True
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while more and left > 0:
                chunk, more = await _next_chunk(request)
                left -= len(chunk)


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
