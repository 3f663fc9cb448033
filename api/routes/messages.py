"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's format, translated into a chat request."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.errors import ServingError
from api.protocol.messages import MessagesTranslation
from api.protocol.messages_stream import MessagesFormatter
from api.routes.chat import answer
from api.routes.openapi import MESSAGE_TOKENS, MESSAGES
from api.routes.tokens import prompt_tokens

router = APIRouter()


@router.post("/v1/messages", **MESSAGES)
async def create_message(request: Request) -> Response:
    translation = MessagesTranslation()
    try:
        return await answer(request, translation.parse, lambda _, completion: MessagesFormatter(completion))
    except ServingError as error:
        raise translation.renamed(error) from None


@router.post("/v1/messages/count_tokens", **MESSAGE_TOKENS)
async def count_tokens(request: Request) -> JSONResponse:
    translation = MessagesTranslation()
    try:
        return await prompt_tokens(request, translation.parse)
    except ServingError as error:
        raise translation.renamed(error) from None
