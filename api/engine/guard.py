"""The guard: what the engine knows about computing wrongly. Counts results that are not finite, and compares the model
with itself while nothing else is to be done: a fingerprint of a fixed question, and the sums of all weights.

The first fingerprint and the first sums are the reference for the later ones. Knows no tensors. Written by the engine
thread, read by any.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

RECENT_S = 600.0
MAX_RECENT = 1000
WEIGHTS = "weights"  # the stage of a difference between the sums of the weights

Outcome = Literal["same", "differs", "pending", "off"]


@dataclass(frozen=True)
class Comparison:
    """How the model compares with another computation of the same, and what differs or why it was not compared."""

    outcome: Outcome
    detail: str = ""


class Integrity(Protocol):
    """How a loaded model can be checked and mended. Engine thread only."""

    every_s: float  # between two rounds
    reference: Comparison  # with the model's original implementation

    def fingerprint(self, interrupted: Callable[[], bool]) -> dict[str, str] | None:
        """A digest of each stage of a fixed question, in the order of computation; None if it was interrupted. Uses and
        changes no cache."""

    def weight_sums(self) -> Iterator[tuple[str, int]]:
        """Name and sum of each part of the weights; a part takes some milliseconds."""

    def drop_caches(self) -> None: ...

    def reload(self) -> None:
        """Load the weights again, in place. Raises LoadError if that is not possible and nothing has changed."""


class Guard:
    def __init__(self) -> None:
        self._nonfinite = 0
        self._nonfinite_at: deque[float] = deque(maxlen=MAX_RECENT)
        self._integrity: Integrity | None = None
        self._loaded = False
        self._first: dict[str, str] | None = None
        self._first_sums: dict[str, int] = {}
        self._sums_known = False
        self._sums: Iterator[tuple[str, int]] | None = None  # of the round in progress
        self._differing_stage = ""
        self._differing_weights: set[str] = set()
        self._taken_at: float | None = None
        self._next_at = 0.0

    def nonfinite(self, now: float) -> None:
        """A request's logits were not finite."""
        self._nonfinite += 1
        self._nonfinite_at.append(now)

    def cured(self) -> None:
        """The caches were dropped or the weights loaded again: only what happens from now on counts as recent."""
        self._nonfinite_at.clear()

    def watch(self, integrity: Integrity | None) -> None:
        """Called once the model is loaded. None: it cannot be checked."""
        self._integrity, self._loaded = integrity, True

    def report(self) -> dict[str, Any]:
        now, taken_at = time.monotonic(), self._taken_at
        stage, integrity = self._stage(), self._integrity
        reference = integrity.reference if integrity else Comparison("off" if self._loaded else "pending")
        outcome: Outcome = "off" if self._loaded and integrity is None else "pending"
        if taken_at is not None:
            outcome = "differs" if stage else "same"
        return {
            "nonfinite_total": self._nonfinite,
            "nonfinite_recent": sum(now - at <= RECENT_S for at in tuple(self._nonfinite_at)),
            "fingerprint": outcome,
            "fingerprint_stage": stage,
            "fingerprint_age_s": None if taken_at is None else round(now - taken_at, 1),
            "reference": reference.outcome,
            "reference_detail": reference.detail,
        }

    def _stage(self) -> str:
        return self._differing_stage or (WEIGHTS if self._differing_weights else "")

    # The engine thread.

    def due_in_s(self) -> float | None:
        """Seconds until `look` has something to do; None: never."""
        return None if self._integrity is None else max(0.0, self._next_at - time.monotonic())

    def look(self, interrupted: Callable[[], bool]) -> None:
        """A part of a round: the fingerprint, then sums of the weights until `interrupted`. Does nothing before it is due."""
        if self._integrity is None or time.monotonic() < self._next_at:
            return
        if self._sums is None:
            if not self.take_fingerprint(interrupted):
                return
            self._sums = self._integrity.weight_sums()
        for name, value in self._sums:
            self._compare_sum(name, value)
            if interrupted():
                return
        self._sums, self._sums_known = None, True
        self._next_at = time.monotonic() + self._integrity.every_s

    def take_fingerprint(self, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Compute the fingerprint now; False if it was interrupted."""
        assert self._integrity is not None
        began = time.monotonic()
        taken = self._integrity.fingerprint(interrupted)
        if taken is None:
            return False
        if self._first is None:
            self._first = taken
            logger.info("event=fingerprint reference=new seconds=%.3f", time.monotonic() - began)
        stage = next((name for name, digest in self._first.items() if taken.get(name) != digest), "")
        if stage and stage != self._differing_stage:
            logger.error("event=fingerprint_differs stage=%s seconds=%.3f", stage, time.monotonic() - began)
        self._differing_stage, self._taken_at = stage, time.monotonic()
        return True

    def postpone(self) -> None:
        """Leave the rest of this round; the next one begins when it is due."""
        assert self._integrity is not None
        self._sums, self._next_at = None, time.monotonic() + self._integrity.every_s

    def look_again(self) -> None:
        """Start a new round at the next opportunity, from the beginning."""
        self._sums, self._next_at = None, 0.0
        self._differing_weights.clear()

    def _compare_sum(self, name: str, value: int) -> None:
        if not self._sums_known:
            self._first_sums[name] = value
        elif self._first_sums.get(name) == value:
            self._differing_weights.discard(name)
        elif name not in self._differing_weights:
            self._differing_weights.add(name)
            logger.error("event=weights_differ part=%s", json.dumps(name))
