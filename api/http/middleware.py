"""The outermost layer: request ids, one log line per request, and the last answer when all else fails."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import internal
from api.health.metrics import Metrics
from api.http.body import ClientGone
from api.http.logging import line

logger = logging.getLogger(__name__)

QUIET_PATHS = frozenset({"/health", "/metrics"})
CLIENT_GONE = 499  # nginx's number; no one receives it
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """A client may send its own x-request-id; one that could garble a log line is replaced."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        log: dict[str, Any] = {}
        scope.setdefault("state", {})
        scope["state"] |= {"log": log, "request_id": request_id}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            status = CLIENT_GONE
            log["failure"] = "client_gone"
        except Exception:  # the last guard: the client gets an answer, the log gets the trace
            logger.exception(line("request_failed", request=request_id))
            if status == 0:
                error = internal()
                await JSONResponse(error.body(), error.status)(scope, receive, send_with_id)
        # The path as the routes spell it: a caller must not be able to make up new label values.
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http(scope["method"] if route != "other" else "other", route, status)
        if scope["path"] not in QUIET_PATHS:
            spent_s = time.monotonic() - began
            words = {"method": scope["method"], "path": scope["path"], "status": status, "s": spent_s}
            logger.info(line("request", request=request_id, **words, **log))
