"""POST /v1/chat/completions and /v1/responses, whole or streamed.

Every request that is accepted here ends in exactly one of: completion, error body, error event.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.errors import ServingError, not_accepting
from api.http.body import ClientGone, parsed, read_body, while_connected
from api.protocol.completion import Completion
from api.protocol.formatter import ChatWords, Words
from api.protocol.responses import Translation
from api.protocol.responses_stream import ResponseWords
from api.protocol.schemas import ChatRequest, parse_chat
from api.requests.handler import start
from api.routes.openapi import CHAT, RESPONSE
from api.routes.sse import StreamedAnswer
from api.state import Services, caller, services

router = APIRouter()


@router.post("/v1/chat/completions", **CHAT)
async def create_chat_completion(request: Request) -> Response:
    return await answered(request, parse_chat, _chat_words)


def _chat_words(chat: ChatRequest, completion: Completion) -> Words:
    return ChatWords(completion, bool(chat.stream_options and chat.stream_options.include_usage))


@router.post("/v1/responses", **RESPONSE)
async def create_response(request: Request) -> Response:
    translation = Translation()
    try:
        return await answered(request, translation.parse, lambda _, made: ResponseWords(translation.asked, made))
    except ServingError as error:
        raise translation.renamed(error) from None


async def answered(
    request: Request, parse: Callable[[bytes], ChatRequest], words: Callable[[ChatRequest, Completion], Words]
) -> Response:
    """The one path of every question; other wire formats bring their own `parse` and `words`."""
    arrived_at = time.monotonic()
    server = services(request)
    _check_open(server)
    server.admission.check(caller(request))  # before the body: whoever is refused need not send it
    body = await read_body(request, server)
    place = server.admission.enter(caller(request))
    try:
        chat = await parsed(parse, body, server.pools.preprocess(place.caller))
        job = await start(request, server, chat, place, arrived_at)
    except BaseException:
        place.close()
        raise
    if chat.stream:
        return StreamedAnswer(request, job, words(chat, job.completion))
    try:
        return JSONResponse(await while_connected(request, job.whole(words(chat, job.completion))))
    except ClientGone:
        job.note("client_gone")
        raise
    finally:
        job.close()


def _check_open(server: Services) -> None:
    stats = server.engine.stats()
    if stats.state in ("loading", "draining", "dead"):
        raise not_accepting(stats.state, stats.progress, stats.reason)
