"""How many blocks of the vision encoder fit into a slice: by what slices took the device, read at a later wait.

The host only queues the work, so its own clock says nothing. Engine thread only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from api.engine.cuda.device import Event
from api.engine.token_budget import PassCost


@dataclass
class VisionPace:
    """Work is counted in the units of VisionEncoder.block_work."""

    _cost: PassCost = field(default_factory=PassCost)
    _slices: deque[tuple[Event, Event, int]] = field(default_factory=deque)  # begin, end, work

    def blocks(self, limit_s: float, block_work: int, left: int) -> int:
        """Blocks that fit into `limit_s`, at least one and at most `left`."""
        if not self._cost.passes:
            return min(left, 1)
        one_s = self._cost.slope_s * block_work
        fitting = (limit_s - self._cost.base_s) / one_s if one_s else left
        return int(min(max(fitting, 1), left))

    def seconds(self, work: int) -> float:
        return self._cost.at(work)

    def queued(self, began: Event, ended: Event, work: int) -> None:
        self._slices.append((began, ended, work))

    def learn(self) -> None:
        """Take in the slices that are done."""
        while self._slices and self._slices[0][1].done():
            began, ended, work = self._slices.popleft()
            self._cost.record(work, ended.seconds_since(began))

    def wait(self) -> None:
        """For all that is queued."""
        if self._slices:
            self._slices[-1][1].wait()
        self.learn()
