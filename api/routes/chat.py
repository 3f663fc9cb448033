"""POST /v1/chat/completions, whole or streamed.

Every request that is accepted here ends in exactly one of: completion, error body, error event.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.caller import Caller
from api.errors import not_accepting
from api.http.connection import EventStream, parse_body, read_body, while_connected
from api.protocol.completion import ChatFormatter, Completion, ResponseFormatter
from api.protocol.fields import STRICT_HEADER, IgnoredFields
from api.protocol.schemas import ChatRequest, parse_chat
from api.routes.openapi import CHAT
from api.state import ServerState

router = APIRouter()
CACHE_KEY_HEADER = "x-glm-cache-key"


@router.post("/v1/chat/completions", **CHAT)
async def create_chat_completion(request: Request) -> Response:
    return await answer(request, parse_chat, _chat_formatter)


def _chat_formatter(chat: ChatRequest, completion: Completion) -> ResponseFormatter:
    options = chat.stream_options
    return ChatFormatter(
        completion,
        include_usage=options is not None and (options.include_usage or options.continuous_usage_stats),
        continuous_usage=options is not None and options.continuous_usage_stats,
        uses_functions=chat.uses_functions,
    )


async def answer(
    request: Request,
    parse: Callable[[bytes, IgnoredFields], ChatRequest],
    formatter: Callable[[ChatRequest, Completion], ResponseFormatter],
) -> Response:
    """Answer one request, in the wire format that `parse` and `formatter` implement.

    The header x-glm-cache-key names what the questions of a conversation share, so that a router can send them to one server.
    The fields that `parse` finds without effect are named in the header x-glm-ignored, the log and the metrics, and left
    in `completion.ignored` for the answer.

    Raises ServingError or ClientDisconnected.
    """
    arrived_at = time.monotonic()
    server: ServerState = request.app.state.server
    caller: Caller = request.state.caller
    stats = server.engine.stats()
    if stats.state in ("loading", "draining", "dead"):
        raise not_accepting(stats.state, stats.progress, stats.reason)
    server.admission.check(caller)  # before the body, so that a refused client need not send it
    with server.admission.arriving(caller) as arriving:
        body = await read_body(request, server.settings.max_body_bytes, arriving.add)
    ignored = ignored_fields(request)

    def read(data: bytes) -> tuple[ChatRequest, str]:
        parsed = parse(data, ignored)
        return parsed, caller.seal(parsed.opening)

    permit = server.admission.admit(caller)
    try:
        chat, cache_key = await parse_body(read, body, server.prompts.pool(caller))
        start = server.handlers.start(chat, permit, request.state.request_id, request.state.log, arrived_at)
        handler = await while_connected(request, start)
    except BaseException:
        permit.release()
        raise
    handler.completion.ignored = note_ignored(request, ignored)
    headers = {CACHE_KEY_HEADER: cache_key, **ignored.headers()}
    request.state.log["cache_key"] = cache_key
    formatted, streams = formatter(chat, handler.completion), chat.stream
    del body, chat, start  # with images they are large, and the answer may take minutes
    if streams:
        return EventStream(handler.events(formatted), handler.close, headers)
    try:
        return JSONResponse(await while_connected(request, handler.body(formatted)), headers=headers)
    finally:
        handler.close()


def ignored_fields(request: Request) -> IgnoredFields:
    """For the fields of this request that will have no effect; strict if its sender or the settings say so."""
    server: ServerState = request.app.state.server
    return IgnoredFields(server.settings.strict_fields or request.headers.get(STRICT_HEADER) in ("1", "true"))


def note_ignored(request: Request, ignored: IgnoredFields) -> list[str]:
    """Log and count the names of an accepted request's fields that have no effect; returns them."""
    if ignored.names:
        request.state.log["ignored"] = ",".join(ignored.names)[:500]
        request.app.state.server.metrics.ignored(ignored.names)
    return ignored.names
