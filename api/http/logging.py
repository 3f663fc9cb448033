"""What is logged: one line per event (`log_output.py` writes it), and one per request with its id.

Prompts, images and keys are never logged.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import log_output
from api.errors import error_body, internal
from api.health.heartbeat import Heartbeat
from api.http.connection import ClientDisconnected

logger = logging.getLogger(__name__)

QUIET_PATHS = frozenset({"/health", "/livez", "/readyz", "/metrics"})
CLIENT_CLOSED_REQUEST = 499  # nginx's status; it is logged and counted, never sent
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def set_up(level: str = "info") -> None:
    """Configures the root logger of the process, once, before the server starts."""
    log_output.set_up(level)
    for chatty in ("httpx", "httpcore", "urllib3", "PIL", "filelock", "torch", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def line(event: str, **values: object) -> str:
    """`event=request status=200 path=/info`; values with spaces or quotes are quoted, None is left out."""
    return " ".join([f"event={event}", *(f"{k}={_quoted(v)}" for k, v in values.items() if v is not None)])


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    plain = text.isprintable() and text and not any(c in text for c in ' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)


class RequestMiddleware:
    """Gives each request an id and a log line, and answers 500 after an unhandled exception.

    A client may send its own x-request-id; one that could garble a log line is replaced, and such an x-session-id is left out.
    Inner layers add their fields of the line to `request.state.log`. `count` is called with each request's method, route and
    status. While the server leaves, each answer closes its connection, because a router sends on in those that it has.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int], None], heartbeat: Heartbeat) -> None:
        self._app = app
        self._count = count
        self._heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        given, session = headers.get("x-request-id", ""), headers.get("x-session-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        log: dict[str, Any] = {"session": session} if _SAFE_ID.fullmatch(session) else {}
        scope.setdefault("state", {})
        scope["state"] |= {"log": log, "request_id": request_id}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer_headers = MutableHeaders(scope=message)
                answer_headers["x-request-id"] = request_id
                if self._heartbeat.leaving:
                    answer_headers["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:
            status = CLIENT_CLOSED_REQUEST
            log["failure"] = "client_gone"
        except Exception:  # the client gets an answer, the log the traceback
            logger.exception(line("request_failed", request=request_id))
            if status == 0:
                error = internal()
                await JSONResponse(error_body(error, scope["path"]), error.status)(scope, receive, send_with_id)
        # The path of the route, not of the request: callers must not be able to create label values.
        route = getattr(scope.get("route"), "path", "other")
        self._count(scope["method"] if route != "other" else "other", route, status)
        if scope["path"] not in QUIET_PATHS:
            facts = {"method": scope["method"], "path": scope["path"], "status": status, "s": time.monotonic() - began}
            logger.info(line("request", request=request_id, **facts, **log))
