"""How many requests may be under way at once, from before their pictures are decoded to their last byte.

The engine bounds its own queue too; this bound also covers the work before it. Used in the event loop only.
"""

from __future__ import annotations

from collections.abc import Callable

from api.errors import queue_full


class Admission:
    """`slots` says how many requests the engine computes at once; it is known when the model is loaded."""

    def __init__(self, queue_size: int, slots: Callable[[], int] = lambda: 1) -> None:
        self._queue_size = queue_size
        self._slots = slots
        self.active = 0

    def check(self) -> None:
        if self.active >= self._queue_size + self._slots():
            raise queue_full(self._queue_size)

    def enter(self) -> Ticket:
        """Raises the 503 error when full."""
        self.check()
        self.active += 1
        return Ticket(self)


class Ticket:
    """A place that is given back once, however often `close` is called."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def close(self) -> None:
        if self._admission is not None:
            self._admission.active -= 1
            self._admission = None
