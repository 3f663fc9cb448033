"""POST /v1/chat/completions, whole or streamed.

Every request that is accepted here ends in exactly one of: completion, error body, error event.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.body import discard_body, read_body, while_connected
from api.errors import ServingError, not_accepting
from api.job import start
from api.openapi import CHAT
from api.schemas import ChatRequest, parse_chat
from api.services import Services, caller, services
from api.sse import StreamedAnswer

router = APIRouter()

LARGE_BODY = 64 * 1024  # parsed beside the event loop


@router.post("/v1/chat/completions", **CHAT)
async def create_chat_completion(request: Request) -> Response:
    arrived_at = time.monotonic()
    server = services(request)
    try:
        _check_open(server)
        server.admission.check(caller(request))
    except ServingError:
        await discard_body(request)
        raise
    body = await read_body(request, server.settings.max_body_bytes, server.admission)
    place = server.admission.enter(caller(request))
    try:
        chat = await _parse(body, server.pools.preprocess)
        job = await start(request, server, chat, place, arrived_at)
    except BaseException:
        place.close()
        raise
    if chat.stream:
        return StreamedAnswer(request, job, bool(chat.stream_options and chat.stream_options.include_usage))
    try:
        return JSONResponse(await while_connected(request, job.whole()))
    finally:
        job.close()


def _check_open(server: Services) -> None:
    stats = server.engine.stats()
    if stats.state in ("loading", "draining", "dead"):
        raise not_accepting(stats.state, stats.progress, stats.reason)


async def _parse(body: bytes, pool: Executor) -> ChatRequest:
    if len(body) <= LARGE_BODY:
        return parse_chat(body)
    return await asyncio.get_running_loop().run_in_executor(pool, parse_chat, body)
