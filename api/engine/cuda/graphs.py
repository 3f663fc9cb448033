"""Recorded decode steps, one for each bucket of rows; a step with fewer rows is padded to the next bucket.

Buckets are recorded one at a time: the largest first, so that every step has one, the others while nothing is to do.
Engine thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from api.engine.cuda.device import Device

logger = logging.getLogger(__name__)


def buckets_for(rows: int) -> tuple[int, ...]:
    """Powers of two up to `rows`, and `rows`."""
    powers = [2**n for n in range(rows.bit_length()) if 2**n < rows]
    return (*powers, rows)


class DecodeGraphs:
    """`step` computes a step of so many rows from buffers that stay where they are."""

    def __init__(self, device: Device, step: Callable[[int], None], buckets: tuple[int, ...]) -> None:
        self._device, self._step = device, step
        self._missing = list(buckets)  # the largest is taken first, then the smallest
        self._replays: dict[int, Callable[[], None]] = {}
        self.off: str | None = None  # why steps are not recorded

    @property
    def captured(self) -> tuple[int, ...]:
        return tuple(sorted(self._replays))

    def capture_next(self) -> bool:
        """Record one more bucket; False if none is left."""
        if self.off is not None or not self._missing:
            return False
        rows = self._missing.pop(0 if self._replays else -1)
        began = time.monotonic()
        self._replays[rows] = self._device.capture(lambda: self._step(rows))
        logger.info("event=graph_captured rows=%d s=%.2f", rows, time.monotonic() - began)
        return bool(self._missing)

    def bucket_for(self, rows: int) -> int | None:
        """The smallest recorded bucket that holds `rows`."""
        return min((bucket for bucket in self._replays if bucket >= rows), default=None)

    def replay(self, bucket: int) -> None:
        self._replays[bucket]()

    def switch_off(self, reason: str) -> None:
        """Compute every step operation by operation from now on."""
        self._replays.clear()
        self.off = reason
        logger.warning("event=graphs_off reason=%s", reason)
