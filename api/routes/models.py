"""GET /v1/models: the model that is served, with the keys that the clients of OpenAI and of Anthropic read."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from api.engine.serving import ServedModel
from api.errors import not_accepting, unknown_model
from api.requests.handler import loaded_model
from api.routes.openapi import MODEL, MODELS
from api.state import ServerState

router = APIRouter()


@router.get("/v1/models", **MODELS)
@router.head("/v1/models", include_in_schema=False)
async def list_models(request: Request) -> dict[str, Any]:
    card = _card(_served(request))
    return {"object": "list", "data": [card], "has_more": False, "first_id": card["id"], "last_id": card["id"]}


@router.get("/v1/models/{model_id:path}", **MODEL)
@router.head("/v1/models/{model_id:path}", include_in_schema=False)
async def get_model(model_id: str, request: Request) -> dict[str, Any]:
    model = _served(request)
    if model_id != model.id:
        raise unknown_model(model_id, model.id)
    return _card(model)


def _served(request: Request) -> ServedModel:
    """The model, unless nobody would be answered: routers read the list to learn whether there is one. Raises the 503 error."""
    server: ServerState = request.app.state.server
    stats = server.engine.stats()
    state = server.heartbeat.state(stats)
    if state in ("dead", "stalled", "loading"):
        raise not_accepting(state, stats.progress, stats.reason)
    return loaded_model(server.engine)


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id, "object": "model", "created": 0, "owned_by": "local", "max_model_len": model.context_tokens,
        "type": "model", "display_name": model.id, "created_at": "1970-01-01T00:00:00Z",
    }  # fmt: skip
