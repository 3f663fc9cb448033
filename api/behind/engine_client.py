"""Speaks HTTP with the engine behind: asks, reads event streams, and turns its errors into those of this API.

Knows neither what a question means nor who asks it. Used in the event loop only.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from api.errors import ServingError, invalid, too_large, unavailable

CONNECT_S = 5.0
KEPT_S = 2.0  # shorter than any engine keeps an idle connection, so that no question is sent into one that is being closed
ERROR_BYTES = 20_000
LINE_BYTES = 8 * 2**20  # of one event
RETRY_S = 5
_TOO_LONG = ("context_length", "context length", "context size", "exceed_context_size", "maximum context")


@dataclass(frozen=True)
class Reply:
    """A whole answer to a short request. `status` 0: none came, and `problem` says why."""

    status: int
    body: Any = None
    text: str = ""
    problem: str = ""
    refused: bool = False  # nothing listens there

    def get(self, name: str) -> Any:
        return self.body.get(name) if isinstance(self.body, dict) else None


class EngineClient:
    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None

    def open(self) -> None:
        """Call in the running event loop."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT_S)
        # The deadline of a request is its own; the engine may be silent for as long as it computes.
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        # Without the proxies of the environment: the engine is a neighbour.
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=self._headers, limits=limits, timeout=timeout, trust_env=False, follow_redirects=False
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def get(self, path: str, limit_s: float) -> Reply:
        return await self._short("GET", path, None, limit_s)

    async def post(self, path: str, body: Any, limit_s: float) -> Reply:
        return await self._short("POST", path, body, limit_s)

    async def _short(self, method: str, path: str, body: Any, limit_s: float) -> Reply:
        """Never raises: what went wrong is in the reply."""
        assert self._client is not None
        try:
            answer = await self._client.request(method, path, json=body, timeout=limit_s)
        except httpx.ConnectError as error:
            return Reply(0, problem=f"it takes no connections ({_why(error)})", refused=True)
        except httpx.TimeoutException:
            return Reply(0, problem=f"it did not answer GET {path} within {limit_s:g} s" if method == "GET" else f"no answer within {limit_s:g} s")
        except httpx.HTTPError as error:
            return Reply(0, problem=_why(error))
        try:
            parsed = answer.json()
        except ValueError:
            parsed = None
        return Reply(answer.status_code, parsed, answer.text)

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of an answer, once the engine has accepted the question. Leaving the context ends it there too.

        Raises ServingError for a refusal, and while the events are read for an error event or a stream that is cut off.
        """
        assert self._client is not None
        # A kept connection may just have been closed by the engine: nothing of an answer has come, so that it is asked again.
        for last in (False, True):
            try:
                request = self._client.build_request("POST", path, json=body)
                response = await self._client.send(request, stream=True)
                break
            except httpx.RemoteProtocolError as error:
                if last:
                    raise unreachable(_why(error)) from None
            except httpx.HTTPError as error:
                raise unreachable(_why(error)) from None
        try:
            if response.status_code != 200:
                raise await _refusal(response)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise unreachable(f"it sends {kind or 'something without a type'} in place of a stream of events")
            yield _events(response)
        finally:
            await response.aclose()


async def _refusal(response: httpx.Response) -> ServingError:
    raw = bytearray()
    try:
        async for piece in response.aiter_bytes():
            raw += piece
            if len(raw) > ERROR_BYTES:
                break
    except httpx.HTTPError:
        pass
    try:
        body = json.loads(bytes(raw))
    except ValueError:
        body = None
    after = response.headers.get("retry-after", "")
    return error_of(body, response.status_code, int(after) if after.isdigit() else None)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event up to [DONE]. Raises ServingError if it is an error, or if the stream ends before."""
    try:
        async for data in _data(response):
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:
                raise cut_off("an event is no JSON") from None
            if not isinstance(event, dict):
                raise cut_off("an event is no JSON object")
            if "error" in event and not event.get("choices"):
                raise error_of(event, 500)
            yield event
    except httpx.HTTPError as error:
        raise cut_off(_why(error)) from None
    raise cut_off("its stream ended early")


async def _data(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event, which may have several lines and ends with an empty one.

    Split at line feeds only: inside of JSON other separators of lines are text.
    """
    pending, data = b"", list[bytes]()
    async for piece in response.aiter_bytes():
        *lines, pending = (pending + piece).split(b"\n")
        if len(pending) + sum(map(len, data)) > LINE_BYTES:
            raise cut_off("an event is too long")
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif data and not line.strip():
                yield b"\n".join(data)
                data = []
    if data:
        yield b"\n".join(data)


def error_of(body: Any, status: int, retry_after_s: int | None = None) -> ServingError:
    """The error of this API for one of the engine's, in whatever form the engine has written it."""
    inner = body.get("error") if isinstance(body, dict) else None
    fields = inner if isinstance(inner, dict) else body if isinstance(body, dict) else {}
    said = fields.get("message") or fields.get("detail") or (inner if isinstance(inner, str) else "") or f"HTTP {status}"
    message = f"The engine behind: {str(said)[:2000]}"
    code = fields.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        status = code  # of an error event
    word = code if isinstance(code, str) else ""
    after = retry_after_s if retry_after_s is not None else RETRY_S
    if 300 <= status < 400:
        message = f"The engine behind answers with a redirect (HTTP {status}): GLM_ENGINE_URL is not its own address."
        return ServingError(500, message, "server_error", "engine_error")
    if status in (401, 403):
        return ServingError(500, "The engine behind refuses GLM_ENGINE_KEY.", "server_error", "engine_unauthorized")
    if status == 404 and (fields.get("param") == "model" or "model" in str(said)):
        return unavailable(f"{message.rstrip('.')}. Perhaps it serves another model now.", "engine_model_changed", RETRY_S)
    if status == 429:
        return unavailable(message, "queue_full", after)
    if status == 503:
        return unavailable(message, word or "engine_unavailable", after)
    if status == 504:
        return ServingError(504, message, "server_error", "deadline")
    if status == 413:
        return too_large(message, _name(fields.get("param")))
    if status < 500:
        known = word or str(fields.get("type") or "")
        long = any(sign in f"{known} {said}" for sign in _TOO_LONG)
        return invalid(message, _name(fields.get("param")), "context_length_exceeded" if long else word or "invalid_value")
    return ServingError(500, message, "server_error", "engine_error")


def unreachable(why: str) -> ServingError:
    """Nothing of an answer has come, so that it is safe to ask again, here or elsewhere."""
    return not_begun(f"The engine behind cannot be asked: {why}")


def not_begun(message: str) -> ServingError:
    """For an answer that ended before its first token: as safe to ask again."""
    return unavailable(message, "engine_unreachable", RETRY_S)


def cut_off(why: str) -> ServingError:
    return ServingError(500, f"The engine behind did not finish the answer: {why}.", "server_error", "engine_cut_off")


def _name(param: Any) -> str | None:
    return param if isinstance(param, str) and param else None


def _why(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:300]
