"""What the service manager is told (sd_notify(3)): that the server is ready, that it moves, and why it is not ready.

Datagrams to the socket that NOTIFY_SOCKET names, so no library is needed. `WATCHDOG=1` is never sent by time alone: only when
the event loop has beaten and the engine has moved since the last one. A step, another phase and a part of the load are moves,
and so is having nothing to do. An engine that hangs is silent, whatever HTTP answers, and the manager ends the process.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

from api.engine.stats import Stats

logger = logging.getLogger(__name__)

MICROSECONDS = 1_000_000


class Watchdog:
    """Called by the heartbeat once a second. Without an address it does nothing."""

    def __init__(self, address: str, stall_s: float, start_deadline_s: float) -> None:
        """`stall_s`: a time without progress that is a hang, unless the engine expects a longer step; `start_deadline_s`: the same
        while the model is loaded."""
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # an abstract name
        self._stall_s = stall_s
        self._start_deadline_s = start_deadline_s
        self._listens = self._ready = self._stopping = False
        self._fed: tuple[float, float] = (0.0, 0.0)  # when loop and engine had moved, as of the last WATCHDOG=1
        self._limit_s = 0.0  # of the watchdog, as the manager knows it
        self._status = ""
        self._failure = ""

    @classmethod
    def from_environment(cls, stall_s: float, start_deadline_s: float, environment: MutableMapping[str, str] = os.environ) -> Watchdog:
        """Takes NOTIFY_SOCKET out of the environment: what this process starts must not speak for it."""
        return cls(environment.pop("NOTIFY_SOCKET", ""), stall_s, start_deadline_s)

    def listens(self) -> None:
        """From now on the server accepts connections."""
        self._listens = True

    def observe(self, stats: Stats, state: str, beat_at: float, moved_at: float) -> None:
        """`state`: of the service; `beat_at`, `moved_at`: when the event loop and the engine last moved (CLOCK_MONOTONIC)."""
        if not self._address:
            return
        words = []
        if state == "draining" and not self._stopping:
            self._stopping = True
            words.append("STOPPING=1")
        limit_s = max(stats.phase_deadline_s or 0.0, self._stall_s)
        if beat_at > self._fed[0] and moved_at > self._fed[1] and state not in ("dead", "stalled"):
            self._fed = (beat_at, moved_at)
            words.append("WATCHDOG=1")
            if not self._ready:
                words.append(f"EXTEND_TIMEOUT_USEC={round(max(limit_s, self._start_deadline_s) * MICROSECONDS)}")
            if not self._ready and self._listens and state in ("idle", "busy"):
                self._ready = True
                words.append("READY=1")
        if self._ready and limit_s != self._limit_s:
            self._limit_s = limit_s
            words.append(f"WATCHDOG_USEC={round(limit_s * MICROSECONDS)}")
        status = _status(stats, state)
        if status != self._status:
            self._status = status
            words.append(f"STATUS={status}")
        if words:
            self._send("\n".join(words))

    def _send(self, text: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(text.encode(), self._address)
            self._failure = ""
        except OSError as error:  # a manager that does not listen must not end the serving
            if not self._failure:
                logger.error("event=manager_not_told address=%r error=%s", self._address, error.strerror)
            self._failure = str(error.strerror)


def _status(stats: Stats, state: str) -> str:
    """One line for `systemctl status`, without figures that change each second."""
    if state == "dead":
        return f"dead: {' '.join((stats.reason or 'unknown').split())[:300]}"
    if state == "loading":
        return f"loading the model ({stats.phase}, {10 * int(10 * stats.progress)} %)"
    return state
