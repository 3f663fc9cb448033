"""The OpenAPI document: the bodies that the routes parse themselves, and every status that they may answer with."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from api.http.auth import OPEN_PATHS
from api.protocol.messages import MessagesRequest
from api.protocol.responses import ResponseRequest
from api.protocol.schemas import HARMLESS, HINTS, WITHOUT_EFFECT, ChatRequest, DetokenizeRequest, TokenizeRequest
from api.protocol.text_completion import CompletionRequest
from api.protocol.vendor_words import SYNONYMS

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest, CompletionRequest, ResponseRequest, MessagesRequest, TokenizeRequest, DetokenizeRequest,
)  # fmt: skip
_MEANINGS = {
    400: "a field is wrong; `param` names it",
    401: "no valid key",
    404: "no such model or route",
    405: "another method is needed",
    408: "the body did not arrive in time",
    413: "the body or an image is too large",
    429: "this key has sent too many requests",
    500: "an error of the server",
    503: "full, loading, draining, stalled or dead; Retry-After says when to come back",
    504: "the request took too long",
}


def _responses(*statuses: int) -> dict[int | str, Any]:
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {status: {"description": _MEANINGS[status], "content": error} for status in statuses}


def _route(body: type[BaseModel] | None, answer: dict[str, Any], *statuses: int) -> dict[str, Any]:
    """The arguments of a route's decorator."""
    out: dict[str, Any] = {
        "response_model": None,
        "responses": {200: {"description": "done", "content": answer}, **_responses(401, 500, *statuses)},
    }
    if body is not None:
        schema = {"$ref": _REF.format(model=body.__name__)}
        content = {"application/json": {"schema": schema}}
        out["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return out


def _json(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"application/json": {"schema": schema}}


NONCE_PARAMETER: dict[str, Any] = {
    "name": "nonce",
    "in": "query",
    "description": "The answer gets a `proof` that is made for it with the probe token.",
    "schema": {"type": "string", "pattern": "^[0-9a-fA-F]{16,64}$"},
}
_TEXT, _COUNT, _LIST = {"type": "string"}, {"type": "integer"}, {"type": "array"}
_EVENTS = {"text/event-stream": {"schema": {"type": "object", "properties": {"event": _TEXT, "data": _TEXT}}}}
_COMPLETION = _json(
    id=_TEXT, object={"const": "chat.completion"}, created=_COUNT, model=_TEXT, request_id=_TEXT,
    choices=_LIST, usage={"type": "object"}, timings={"type": "object"},
)  # fmt: skip
_ids = {"type": "array", "items": _COUNT}
CHAT = _route(ChatRequest, {**_COMPLETION, **_EVENTS}, 400, 404, 408, 413, 429, 503, 504)
_RESPONSE = _json(id=_TEXT, object={"const": "response"}, status=_TEXT, output=_LIST)
RESPONSE = _route(ResponseRequest, {**_RESPONSE, **_EVENTS}, 400, 404, 408, 413, 429, 503, 504)
_TEXTS = _json(id=_TEXT, object={"const": "text_completion"}, created=_COUNT, model=_TEXT, choices=_LIST)
TEXT = _route(CompletionRequest, {**_TEXTS, **_EVENTS}, 400, 404, 408, 413, 429, 503, 504)
_MESSAGE = _json(id=_TEXT, type={"const": "message"}, role=_TEXT, content=_LIST, usage={"type": "object"})
MESSAGES = _route(MessagesRequest, {**_MESSAGE, **_EVENTS}, 400, 404, 408, 413, 429, 503, 504)
MESSAGE_TOKENS = _route(MessagesRequest, _json(input_tokens=_COUNT), 400, 404, 408, 413, 429, 503)
RESPONSE_TOKENS = _route(ResponseRequest, _json(input_tokens=_COUNT), 400, 404, 408, 413, 429, 503)
TOKENIZE = _route(TokenizeRequest, _json(tokens=_ids, count=_COUNT, max_model_len=_COUNT), 400, 404, 408, 413, 429, 503)
DETOKENIZE = _route(DetokenizeRequest, _json(prompt=_TEXT), 400, 404, 408, 413, 429, 503)
MODELS = _route(None, _json(object={"const": "list"}, data=_LIST), 503)
MODEL = _route(None, _json(id=_TEXT, object={"const": "model"}), 404, 503)
_STATE = {"application/json": {"schema": {"type": "object", "required": ["state"]}}}
HEALTH: dict[str, Any] = {
    "response_model": None,
    "responses": {
        200: {"description": "the model answers", "content": _STATE},
        503: {"description": "it does not, and `state` says why", "content": _STATE},
        **_responses(400),
    },
    "openapi_extra": {"parameters": [NONCE_PARAMETER]},
}
LIVEZ: dict[str, Any] = {
    "response_model": None,
    "responses": {
        200: {"description": "the process may go on, also while it loads or drains", "content": _STATE},
        503: {"description": "it is dead or stalled, and only a new one can help", "content": _STATE},
    },
}
PING: dict[str, Any] = {
    "response_model": None,
    "response_class": Response,
    "responses": {200: {"description": "the model answers"}, 503: {"description": "it does not"}},
}
VERSION = _route(None, _json(version=_TEXT))
INFO = _route(None, {"application/json": {"schema": {"type": "object"}}}, 503)
METRICS = _route(None, {"text/plain": {"schema": _TEXT}})
DOCUMENT = _route(None, {"application/json": {"schema": {"type": "object"}}})


def document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for body in _BODIES:
            own = body.model_json_schema(ref_template=_REF)
            schemas |= own.pop("$defs", {})
            schemas[body.__name__] = own
        _add_ignored(schemas[ChatRequest.__name__])
        schemas["Error"] = _error()
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        for path in OPEN_PATHS:
            schema["paths"].get(path, {}).get("get", {})["security"] = []
        app.openapi_schema = schema
    return app.openapi_schema


def _add_ignored(chat: dict[str, Any]) -> None:
    for word, field in SYNONYMS.items():
        chat["properties"][word] = {"description": f"Another word for `{field}`."}
    for name, why in {**HARMLESS, **HINTS}.items():
        chat["properties"][name] = {"description": f"Accepted without effect: {why}."}
    for name, values in WITHOUT_EFFECT.items():
        chat["properties"][name] = {"enum": [*values, None], "description": "Holds here anyway; other values are refused."}


def _error() -> dict[str, Any]:
    nullable: dict[str, Any] = {name: {"type": ["string", "null"]} for name in ("param", "code")}
    properties = {"message": _TEXT, "type": _TEXT, **nullable}
    error = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
