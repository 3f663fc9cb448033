"""POST /v1/responses: translated into a chat request, and answered as one."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.errors import ServingError
from api.protocol.responses import Translation
from api.protocol.responses_stream import ResponsesFormatter
from api.routes.chat import answer
from api.routes.openapi import RESPONSE

router = APIRouter()


@router.post("/v1/responses", **RESPONSE)
async def create_response(request: Request) -> Response:
    translation = Translation()
    try:
        return await answer(
            request, translation.parse, lambda _, completion: ResponsesFormatter(translation.request, completion)
        )
    except ServingError as error:
        raise translation.renamed(error) from None
