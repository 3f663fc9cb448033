"""POST /v1/responses and /v1/responses/input_tokens: translated into a chat request, and answered as one."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.errors import ServingError
from api.protocol.responses import Translation
from api.protocol.responses_stream import ResponsesFormatter
from api.routes.chat import answer
from api.routes.openapi import RESPONSE, RESPONSE_TOKENS
from api.routes.tokens import prompt_tokens

router = APIRouter()


@router.post("/v1/responses", **RESPONSE)
async def create_response(request: Request) -> Response:
    translation = Translation()
    try:
        return await answer(
            request,
            translation.parse,
            lambda _, completion: ResponsesFormatter(translation.request, completion, translation.functions),
        )
    except ServingError as error:
        raise translation.renamed(error) from None


@router.post("/v1/responses/input_tokens", **RESPONSE_TOKENS)
async def count_input_tokens(request: Request) -> JSONResponse:
    translation = Translation()
    try:
        return await prompt_tokens(request, translation.parse, object="response.input_tokens")
    except ServingError as error:
        raise translation.renamed(error) from None
