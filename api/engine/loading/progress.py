"""The progress of loading, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float], None]


def part(progress: Progress, start: float, end: float) -> Progress:
    """Maps a progress from 0 to 1 to the part from `start` to `end` of `progress`."""
    return lambda fraction: progress(start + (end - start) * min(max(fraction, 0.0), 1.0))
