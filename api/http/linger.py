"""Answers at once a request whose body is still on its way, and then reads on for a while.

Whoever is refused by the key, the path or a limit hears so before the body is sent. A connection closed on a client
that still sends would be reset, and the answer lost with it; so the rest is read and thrown away first.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 10.0
LINGER_BYTES = 256 * 2**20


class LingerMiddleware:
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
        self._owes_end = False  # of the answer, which closes the connection

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        await app(scope, self.receive, self.send)
        if self._owes_end:
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
            message, self._owes_end = {**message, "more_body": True}, True
        await self._send(message)

    async def _discard(self) -> None:
        left = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._arriving and left > 0:
                    left -= len((await self.receive()).get("body", b""))


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
