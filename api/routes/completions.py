"""POST /v1/completions: a text goes on; answered through the internal request of a chat."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.protocol.text_completion import TextFormatter, TextRequest, parse_text
from api.routes.chat import answer
from api.routes.openapi import TEXT

router = APIRouter()


@router.post("/v1/completions", **TEXT)
async def create_completion(request: Request) -> Response:
    return await answer(
        request, parse_text, lambda text, completion: TextFormatter(cast(TextRequest, text), completion)
    )
