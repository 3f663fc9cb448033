"""Who may come in: nobody without the key, but for the paths that are listed as open."""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import unauthorized

OPEN_PATHS = frozenset({"/health"})


class KeyMiddleware:
    """Deny by default: a route added later is closed until it is listed in OPEN_PATHS."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._digest = sha256(key.encode()).digest() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = unauthorized()
            headers = {"WWW-Authenticate": "Bearer"}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _may_pass(self, scope: Scope) -> bool:
        if self._digest is None or scope["path"] in OPEN_PATHS:
            return True
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Digests have one length, so neither length nor content of the key shows in the time taken.
        return hmac.compare_digest(sha256(given.encode()).digest(), self._digest)
