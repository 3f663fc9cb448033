"""Whether this page can ask its API: a route beside Streamlit, behind the page's token, for the checker.

The page keeps the address and the key that it was started with, so only the page can say whether they still work.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from web.api_client.client import ApiClient

PATH = "/_stcore/api-contact"  # below PROGRAM_PREFIX of access.py: a program passes the token in the query
FRESH_S = 5.0  # one request answers all that ask within this time
NOT_NOW = (429, 503)  # the API is there and knows the key, but is loading or busy


class ApiContact:
    """Answers PATH with `api` (ok, refused, loading, unreachable), the HTTP `status` (0 without one), and the API's `address`."""

    def __init__(self, app: ASGIApp, client: ApiClient) -> None:
        self._app = app
        self._client = client
        self._one_at_a_time = asyncio.Lock()
        self._answer: dict[str, Any] = {}
        self._asked_at = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH:
            response = JSONResponse(await self._contact(), headers={"Cache-Control": "no-store"})
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _contact(self) -> dict[str, Any]:
        async with self._one_at_a_time:
            if time.monotonic() - self._asked_at >= FRESH_S:
                status = await asyncio.to_thread(self._client.models_status)
                self._answer = {"api": _word(status), "status": status, "address": _address(self._client.base_url)}
                self._asked_at = time.monotonic()
            return self._answer


def _word(status: int) -> str:
    if status == 200:
        return "ok"
    if status in (401, 403):
        return "refused"
    return "loading" if status in NOT_NOW else "unreachable"


def _address(url: str) -> str:
    """Without a name and password, which a URL may hold."""
    return urlsplit(url).netloc.rpartition("@")[2]
