"""The progress of loading: of a download in bytes, and of the weights from the progress bar of the library that loads them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

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


@contextmanager
def weights_progress(progress: Progress) -> Iterator[None]:
    """Report the progress bar that transformers shows while it loads weights, instead of printing it."""

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _SilentBar:
        return _SilentBar(progress, *args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _SilentBar:
    """The part of tqdm's interface that transformers uses."""

    def __init__(self, progress: Progress, iterable: Iterable[Any] = (), total: float | None = None, **_: Any) -> None:
        self._progress = progress
        self._items = iterable
        self._total = total or (len(iterable) if isinstance(iterable, Sized) else 0)
        self._count = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update(1)

    def update(self, count: float = 1) -> None:
        self._count += count
        if self._total:
            self._progress(self._count / self._total)

    def __enter__(self) -> _SilentBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # set_postfix, close, refresh ...
