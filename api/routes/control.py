"""POST /control: the checker's cures that need no restart. Only with the right probe token.

The body is {"action": "drop-caches" | "reload-weights" | "fingerprint"}; the answer comes once the engine has done it:
{"done": true, "seconds": S}.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from hashlib import sha256
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from api.engine.command import ACTIONS, Action, CommandFailed
from api.engine.engine import NotAccepting
from api.errors import ServingError, invalid, not_accepting
from api.http.auth import PROBE_HEADER
from api.http.connection import read_body
from api.state import ServerState
from settings import Settings

router = APIRouter()
MAX_BODY_BYTES = 1000
TIMEOUT_S = 300.0  # loading the weights of a large model again


@router.post("/control", include_in_schema=False)
async def control(request: Request) -> dict[str, Any]:
    server: ServerState = request.app.state.server
    if not _is_checker(request, server.settings):
        raise ServingError(403, "Only the checker may do this.", "permission_error", "forbidden")
    if server.engine.behind() is not None:  # the checker takes the next rung
        raise ServingError(404, "The engine is another process, which takes no commands from here.", "invalid_request_error", "unsupported_by_engine")
    action = _action(await read_body(request, MAX_BODY_BYTES, lambda size: None))
    try:
        seconds = await asyncio.to_thread(server.engine.command, action, TIMEOUT_S)
    except NotAccepting as error:
        raise not_accepting(error.state, server.engine.stats().progress, str(error)) from None
    except CommandFailed as error:
        raise ServingError(500, f"{action}: {error}", "server_error", "control_failed") from None
    return {"done": True, "seconds": round(seconds, 3)}


def _is_checker(request: Request, settings: Settings) -> bool:
    if settings.probe_token is None:
        return False
    known = settings.probe_token.get_secret_value()
    digests = (sha256(token.encode()).digest() for token in (request.headers.get(PROBE_HEADER, ""), known))
    return hmac.compare_digest(*digests)


def _action(body: bytes) -> Action:
    try:
        given = json.loads(body)["action"]
    except (ValueError, TypeError, KeyError):
        given = None
    for action in ACTIONS:
        if given == action:
            return action
    raise invalid(f"`action` must be one of {', '.join(ACTIONS)}. Given: {given!r}", "action")
