"""Server-sent events of one job, for as long as its client listens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.sse import format_sse_event
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import ServingError, internal
from api.http.body import ClientGone, while_connected
from api.protocol.formatter import Words
from api.requests.handler import Job

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
# A client that takes nothing for so long has gone, even if its connection stands.
SEND_S = 30.0


class StreamedAnswer(Response):
    """Sends a job's events; the job is closed when the client goes, even before the first byte."""

    def __init__(self, request: Request, job: Job, words: Words) -> None:
        # The second header keeps nginx from holding the stream back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._request = request
        self._job = job
        self._words = words

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._request, self._send_all(send))
        except ClientGone:
            self._job.note("client_gone")
        finally:
            self._job.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events():
                await _send_soon(send, data)
        except ServingError as error:
            await _send_soon(send, _encoded(*self._words.failed(error)))
        except ClientGone:
            raise
        except Exception:  # the stream has begun: only an event can tell the client
            logger.exception("event=stream_failed engine_request=%s", self._job.completion.id)
            await _send_soon(send, _encoded(*self._words.failed(internal())))
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        for said in self._words.opening():
            yield _encoded(*said)
        async for part in self._job.chunks(HEARTBEAT_S):
            if isinstance(part, str):
                yield format_sse_event(comment=part)
                continue
            for said in self._words.say(part):
                yield _encoded(*said)
        for said in self._words.closing():
            yield _encoded(*said)


async def _send_soon(send: Send, data: bytes) -> None:
    try:
        async with asyncio.timeout(SEND_S):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except TimeoutError:
        raise ClientGone from None


def _encoded(name: str | None, data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return format_sse_event(data_str=text, event=name)
