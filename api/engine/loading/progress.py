"""The progress of loading, taken from the progress bars of the libraries that download and load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

Progress = Callable[[float], None]


def part(progress: Progress, start: float, end: float) -> Progress:
    """Maps a progress from 0 to 1 to the part from `start` to `end` of `progress`."""
    return lambda fraction: progress(start + (end - start) * min(max(fraction, 0.0), 1.0))


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
