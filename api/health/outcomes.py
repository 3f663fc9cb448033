"""What became of the requests of users: answers by kind and failures by reason, as the users saw them."""

from __future__ import annotations

import threading
import time
from collections import Counter

KINDS = ("text", "picture")
RECENT_S = 600.0
MOST_CALLERS = 16  # remembered for each reason


class Outcomes:
    """Counts since the process started. Thread-safe.

    Neither probes, nor requests that were refused or given up by their senders, are to be counted here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = dict.fromkeys(KINDS, 0)  # requests with a picture, and those without
        self._failed: Counter[str] = Counter()
        self._failed_at: dict[str, dict[str, float]] = {}  # reason -> caller -> when, the latest last
        self._succeeded_at: dict[str, float] = {}

    def answered(self, picture: bool) -> None:
        """A user has got a complete answer. One to a picture shows that text works too."""
        now = time.monotonic()
        with self._lock:
            self._answered["picture" if picture else "text"] += 1
            for kind in KINDS if picture else ("text",):
                self._succeeded_at[kind] = now

    def failed(self, reason: str, caller: str = "") -> None:
        """A user has got an error of the server, or an answer that broke off. `caller`: the name of its key."""
        with self._lock:
            self._failed[reason] += 1
            callers = self._failed_at.setdefault(reason, {})
            callers.pop(caller, None)
            callers[caller] = time.monotonic()
            if len(callers) > MOST_CALLERS:
                del callers[next(iter(callers))]

    def failed_callers(self) -> dict[str, int]:
        """How many callers have met each reason within ten minutes: one may have brought it about itself."""
        now = time.monotonic()
        with self._lock:
            counted = {reason: sum(now - at < RECENT_S for at in callers.values()) for reason, callers in self._failed_at.items()}
        return {reason: number for reason, number in counted.items() if number}

    def counts(self) -> dict[str, dict[str, int]]:
        with self._lock:
            return {"answered": dict(self._answered), "failed": dict(self._failed)}

    def success_age_s(self) -> dict[str, float]:
        """Seconds since the last complete answer to a user, by kind.

        The checker may accept it in place of an answer to its own probe.
        """
        now = time.monotonic()
        with self._lock:
            return {kind: round(now - at, 1) for kind, at in self._succeeded_at.items()}
