"""Who runs next: first come, first served, from a bounded queue.

Pure bookkeeping, not thread-safe by itself (the engine holds a lock around every call) and without
tensors. A step is one unit of work: one picture, one prefill, or one token for every running request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from api.engine.request import Sequence

Work = Literal["vision", "prefill", "decode"]


class QueueFull(Exception):
    """The waiting queue holds as many requests as it may."""


@dataclass(frozen=True)
class Step:
    work: Work
    sequences: tuple[Sequence, ...]


class Scheduler:
    def __init__(self, queue_size: int, max_running: int = 1) -> None:
        self._queue_size = queue_size
        self._max_running = max_running
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        # A request that can run at once does not count as waiting.
        free = self._max_running - len(self._running)
        if len(self._waiting) >= self._queue_size + max(free, 0):
            raise QueueFull(f"{len(self._waiting)} requests are waiting")
        self._waiting.append(sequence)

    def position(self, request_id: str) -> int | None:
        """0 for a running request, 1 for the first in the queue, None for one that is not here."""
        if any(s.request.id == request_id for s in self._running):
            return 0
        for place, sequence in enumerate(self._waiting, start=1):
            if sequence.request.id == request_id:
                return place
        return None

    def schedule(self) -> Step | None:
        """Admit what fits, then choose: the first picture or prompt that is due, else one token for all."""
        while self._waiting and len(self._running) < self._max_running:
            self._running.append(self._waiting.popleft())
        for sequence in self._running:
            if sequence.needs_picture:
                return Step("vision", (sequence,))
            if not sequence.prefilled:
                return Step("prefill", (sequence,))
        return Step("decode", tuple(self._running)) if self._running else None

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; doing so twice is no mistake."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def find(self, request_id: str) -> Sequence | None:
        return next((s for s in self.sequences() if s.request.id == request_id), None)

    def aborted(self) -> list[Sequence]:
        return [s for s in self.sequences() if s.aborted]

    def sequences(self) -> list[Sequence]:
        return [*self._running, *self._waiting]
