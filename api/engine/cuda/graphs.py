"""Recorded steps: decode steps by rows, and steps with prompts by their tokens, alone or beside decoding rows.

A step is padded to the next size that is recorded. Sizes are recorded one at a time: the largest first, so that every step
has one, the others while nothing is to do. Engine thread only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from api.engine.cuda.device import Device

logger = logging.getLogger(__name__)

Kind = Literal["decode", "prompt", "mixed"]
SMALLEST_PROMPT = 16  # tokens; fewer take as long


class Size(NamedTuple):
    """Rows of a decode step, or prompt tokens of another. In a mixed step all rows that can decode are computed too."""

    kind: Kind
    rows: int


def sizes_for(rows: int, tokens: int) -> list[Size]:
    """Powers of two up to `rows` and prompts of up to `tokens`, in the order of recording; without prompts if it is 0."""
    prompts = [n for n in _powers(tokens) if n >= SMALLEST_PROMPT] if tokens else []
    decode = [Size("decode", n) for n in _powers(rows)]
    alone, mixed = ([Size(kind, n) for n in prompts] for kind in ("prompt", "mixed"))
    largest = [sizes.pop() for sizes in (decode, alone, mixed) if sizes]
    return [*largest, *decode, *alone, *mixed]


def _powers(limit: int) -> list[int]:
    return [*(2**n for n in range(limit.bit_length()) if 2**n < limit), limit]


class StepGraphs:
    """`step` computes a step of a size from buffers that stay where they are."""

    def __init__(self, device: Device, step: Callable[[Size], None], sizes: list[Size]) -> None:
        self._device, self._step = device, step
        self._missing = list(sizes)
        self._replays: dict[Size, Callable[[], None]] = {}
        self.off: str | None = None  # why steps are not recorded

    @property
    def captured(self) -> tuple[Size, ...]:
        return tuple(sorted(self._replays))

    @property
    def complete(self) -> bool:
        return not self._missing

    def capture_next(self) -> bool:
        """Record one more size; False if none is left."""
        if self.off is not None or not self._missing:
            return False
        size = self._missing[0]
        began = time.monotonic()
        self._replays[size] = self._device.capture(lambda: self._step(size))
        self._missing.pop(0)
        logger.info("event=graph_captured kind=%s size=%d s=%.2f", *size, time.monotonic() - began)
        return bool(self._missing)

    def find(self, kind: Kind, count: int) -> Size | None:
        """The smallest recorded size that holds so many rows or tokens."""
        return min((size for size in self._replays if size.kind == kind and size.rows >= count), default=None)

    def replay(self, size: Size) -> None:
        self._replays[size]()

    def stop_recording(self, reason: str) -> None:
        """Keep what is recorded, and compute the rest in larger sizes or operation by operation."""
        self._missing.clear()
        logger.warning("event=graphs_incomplete recorded=%d reason=%s", len(self._replays), json.dumps(reason))

    def switch_off(self, reason: str) -> None:
        """Compute every step operation by operation from now on."""
        self._replays.clear()
        self.off = reason
        logger.warning("event=graphs_off reason=%s", json.dumps(reason))
