"""The progress of loading: from 0 to 1, and of a download in bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from api.engine.engine import Progress
from api.engine.stats import Download

RATE_S = 15.0  # the rate is that of the last so many seconds
SAMPLE_S = 0.5


def part(progress: Progress, start: float, end: float) -> Progress:
    """Maps a progress from 0 to 1 to the part from `start` to `end` of `progress`."""

    def report(fraction: float, download: Callable[[], Download] | None = None) -> None:
        mapped = start + (end - start) * min(max(fraction, 0.0), 1.0)
        if download is None:
            progress(mapped)
        else:
            progress(mapped, download)

    return report


def unseen(fraction: float, download: Callable[[], Download] | None = None) -> None:
    """Progress that nobody watches."""


class DownloadMeter:
    """Counts what comes of a download. Thread-safe. Only bytes are progress: a hub that answers but sends nothing stands still."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._clock = progress, clock
        self._lock = threading.Lock()
        self._hub = self._file = self._trouble = self._elsewhere = ""
        self._present = self._total = 0
        self._came: deque[tuple[float, int]] = deque()  # (from when on, bytes that the line has brought since)
        self._told = False
        self.moved = False  # bytes have come since this meter was made

    def begin(self, hub: str, present: int, total: int) -> None:
        """A hub has told its files: `total` bytes, of which `present` are here already."""
        with self._lock:
            self._hub, self._file, self._present, self._total = hub, "", present, total
            self._came.clear()

    def connect(self, hub: str, elsewhere: str = "") -> None:
        """Nothing is known yet but whom is asked. `elsewhere`: why it is not the one that is set."""
        with self._lock:
            self._hub, self._trouble, self._elsewhere = hub, "", elsewhere
            first, self._told = not self._told, True
        if first:
            self._report()

    def add(self, size: int, file: str) -> None:
        """Bytes that have come, or, negative, that have proved useless."""
        with self._lock:
            self._present += size
            self._file = file
            if size > 0:
                self.moved = True
                now = self._clock()
                if self._came and now - self._came[-1][0] < SAMPLE_S:
                    self._came[-1] = (self._came[-1][0], self._came[-1][1] + size)
                else:
                    self._came.append((now, size))
        self._report()

    def set_present(self, present: int) -> None:
        """What another process has downloaded."""
        with self._lock:
            more = present - self._present
        if more > 0:
            self.add(more, self._file)

    def touch(self) -> None:
        """Bytes that are here already are being checked."""
        self._report()

    def say(self, trouble: str) -> None:
        """Why nothing comes; empty: it comes again."""
        with self._lock:
            self._trouble = trouble

    def read(self) -> Download:
        with self._lock:
            now = self._clock()
            while self._came and now - self._came[0][0] > RATE_S:
                self._came.popleft()
            span = max(now - self._came[0][0], SAMPLE_S) if self._came else 0.0
            rate = sum(size for _, size in self._came) / span if span else 0.0
            left = max(self._total - self._present, 0)
            return Download(
                hub=self._hub,
                file=self._file,
                downloaded_bytes=self._present,
                total_bytes=self._total,
                bytes_per_s=round(rate, 1),
                remaining_s=round(left / rate, 1) if rate else None,
                trouble=self._trouble or self._elsewhere,
            )

    def _report(self) -> None:
        with self._lock:
            fraction = self._present / self._total if self._total else 0.0
        self._progress(fraction, self.read)

