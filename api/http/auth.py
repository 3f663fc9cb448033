"""Authentication: every path needs a key, except those listed in OPEN_PATHS. The metrics key opens METRICS_PATH only."""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.caller import NOBODY, Caller
from api.errors import error_body, unauthorized
from settings import PROBE_KEY, Settings, digest_of_metrics_key, digests_of_keys

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"})
METRICS_PATH = "/metrics"
PROBE = PROBE_KEY
PROBE_HEADER = "x-glm-probe"


class KeyRing:
    """Keys by name; only their SHA-256 digests are held in memory."""

    def __init__(self, digests: dict[str, bytes], metrics: bytes | None = None) -> None:
        self._digests = digests
        self._metrics = metrics

    @classmethod
    def of(cls, settings: Settings) -> KeyRing:
        """The keys of the settings. Raises SettingsError for entries that do not parse."""
        return cls(digests_of_keys(settings), digest_of_metrics_key(settings))

    def __bool__(self) -> bool:
        """Whether there is any key besides the probe token."""
        return bool(self._digests.keys() - {PROBE})

    def caller(self, headers: Headers) -> Caller | None:
        """The owner of the key in `headers`, or None if there is no valid one."""
        given = _given(headers)
        name = self._name_of(given) if self else NOBODY.name
        if name is None:
            return None
        secret = sha256(given.encode()).digest() if self else b""
        claim = headers.get(PROBE_HEADER, "")
        is_probe = name == PROBE or self._name_of(claim) == PROBE
        return Caller(name, is_probe, bool(claim) and not is_probe, secret)

    def opens_metrics(self, headers: Headers) -> bool:
        """Whether the key in `headers` is the one that opens METRICS_PATH and nothing else."""
        return self._metrics is not None and hmac.compare_digest(sha256(_given(headers).encode()).digest(), self._metrics)

    def _name_of(self, given: str) -> str | None:
        # All digests are compared, and all have the same length, so that the time taken reveals nothing about a key.
        digest = sha256(given.encode()).digest()
        names = [name for name, known in self._digests.items() if hmac.compare_digest(digest, known)]
        return names[0] if names else None


class KeyMiddleware:
    """Denies by default: a new route needs a key until its path is listed in OPEN_PATHS. OPTIONS is answered to everyone."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            # A browser asks without a key, and no route does anything for it. CORSMiddleware answers allowed origins.
            await Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS, POST"})(scope, receive, send)
            return
        caller = self._keys.caller(Headers(scope=scope))
        if caller is not None or scope["path"] in OPEN_PATHS or self._scrapes(scope):
            state = scope.setdefault("state", {})
            state["caller"] = caller or NOBODY
            state.get("log", {})["key"] = None if caller in (None, NOBODY) else caller.name
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = unauthorized()
            headers = {"WWW-Authenticate": "Bearer"}
            await JSONResponse(error_body(error, scope["path"]), error.status, headers)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


    def _scrapes(self, scope: Scope) -> bool:
        return scope["type"] == "http" and scope["path"] == METRICS_PATH and self._keys.opens_metrics(Headers(scope=scope))


def _given(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
