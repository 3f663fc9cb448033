"""Decides how a request of a user has ended, once for each: answered, failed for a reason, or neither.

Every error passes here, whichever layer has caused it, so that no failure goes uncounted.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.caller import Caller
from api.health.outcomes import Outcomes
from api.http.auth import PROBE_HEADER
from api.http.connection import ClientDisconnected

# Refusals for load and for a planned end, and requests that their senders gave up: no failures of the server.
REFUSALS = frozenset({"queue_full", "loading", "draining"})
GIVEN_UP = frozenset({"client_gone", "aborted", "shutdown"})


class OutcomeMiddleware:
    """Tells `outcomes` of every POST of a user. Belongs inside the middleware that answers for unhandled exceptions.

    Inner layers leave the reason of a failure in `failure`, the code of an error in `error` and the reasons of an
    answer's end in `finish` of the request's log fields.
    """

    def __init__(self, app: ASGIApp, outcomes: Outcomes) -> None:
        self._app = app
        self._outcomes = outcomes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        status = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        failure: str | None = None
        try:
            await self._app(scope, receive, send_noting_status)
        except ClientDisconnected:
            failure = "client_gone"
            raise
        except Exception as error:  # counted before anything else is tried: memory may be short
            failure = "memory" if isinstance(error, MemoryError) else "internal"
            raise
        finally:
            if _is_of_user(scope):
                self._settle(scope["state"]["log"], status, failure, scope["state"].get("caller"))

    def _settle(self, log: dict[str, Any], status: int, failure: str | None, caller: Caller | None) -> None:
        failure = log.get("failure", failure)
        if failure is None and status >= 500:
            failure = log.get("error", "internal")
        if failure in GIVEN_UP or (status == 503 and failure in REFUSALS):
            return
        if failure is not None:
            self._outcomes.failed(failure, caller.name if caller is not None else "")
        elif "finish" in log:
            self._outcomes.answered(picture=bool(log.get("images")))


def _is_of_user(scope: Scope) -> bool:
    """Without a caller, since authentication itself has failed, the header decides."""
    caller: Caller | None = scope["state"].get("caller")
    return caller.is_user if caller is not None else not Headers(scope=scope).get(PROBE_HEADER)
