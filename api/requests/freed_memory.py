"""Returns the memory of large bodies to the system once the server is quiet.

glibc is told to keep freed memory, which makes the model's work three times as fast (api/engine/process.py). A burst of
large bodies would so leave up to 256 MiB in the process for good: 20 bodies of 20 MiB, 264 MiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from api.engine.process import release_freed_memory

LARGE_BYTES = 4 * 2**20  # of one body
QUIET_S = 2.0  # from the last large body; doing it between two bodies would only fault the memory in again


class FreedMemory:
    """`busy`: whether requests are being worked on. Called in the event loop only."""

    def __init__(self, busy: Callable[[], bool], release: Callable[[], None] = release_freed_memory) -> None:
        self._busy = busy
        self._release = release
        self._timer: asyncio.TimerHandle | None = None

    def expect(self) -> None:
        """A body of LARGE_BYTES or more has arrived, or has been given up."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._try)

    def _try(self) -> None:
        self._timer = None
        if self._busy():
            self.expect()
        else:
            # In a thread: it takes the lock of the allocator for some milliseconds, but the loop's turn is not held up.
            asyncio.get_running_loop().run_in_executor(None, self._release)
