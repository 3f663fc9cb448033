"""GET /v1/models: the one model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from api.engine.loaded_model import Model
from api.errors import unknown_model
from api.routes.openapi import MODEL, MODELS
from api.state import services

router = APIRouter()


@router.get("/v1/models", **MODELS)
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_card(services(request).model())]}


@router.get("/v1/models/{model_id:path}", **MODEL)
async def get_model(model_id: str, request: Request) -> dict[str, Any]:
    model = services(request).model()
    if model_id != model.id:
        raise unknown_model(model_id, model.id)
    return _card(model)


def _card(model: Model) -> dict[str, Any]:
    return {"id": model.id, "object": "model", "created": 0, "owned_by": "local", "max_model_len": model.context_tokens}
