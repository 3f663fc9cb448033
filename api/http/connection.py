"""A connection that does not wait for ever: uvicorn limits how long one may be idle, not how slowly a head may come.

Without it, whoever opens connections and sends a byte now and then holds a file of the server each, without a key.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0  # from opening a connection, or the first byte after an answer, to the end of a request's headers


class Connection(H11Protocol):
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self._in_request():
            self._forget()
        elif self._limit is None:
            self._limit = self.loop.call_later(HEAD_S, self.transport.close)

    def _forget(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete
