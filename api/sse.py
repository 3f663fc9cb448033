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

from api.body import ClientGone, while_connected
from api.errors import ServingError, internal
from api.job import Job

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
# A client that takes nothing for so long has gone, even if its connection stands.
SEND_S = 30.0


class StreamedAnswer(Response):
    """Sends a job's events; the job is closed when the client goes, even before the first byte."""

    def __init__(self, request: Request, job: Job, include_usage: bool) -> None:
        # The second header keeps nginx from holding the stream back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._request = request
        self._job = job
        self._include_usage = include_usage

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
            await _send_soon(send, error.event())
        except ClientGone:
            raise
        except Exception:  # the stream has begun: only an event can tell the client
            logger.exception("event=stream_failed engine_request=%s", self._job.completion.id)
            await _send_soon(send, internal().event())
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        completion = self._job.completion
        for chunk in completion.opening():
            yield _event(chunk)
        async for part in self._job.chunks(HEARTBEAT_S):
            yield format_sse_event(comment=part) if isinstance(part, str) else _event(part)
        if self._include_usage:
            yield _event(completion.usage_chunk())
        yield format_sse_event(data_str="[DONE]")


async def _send_soon(send: Send, data: bytes) -> None:
    try:
        async with asyncio.timeout(SEND_S):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except TimeoutError:
        raise ClientGone from None


def _event(chunk: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))
