"""Thresholds that warn and never cause a restart. Pure functions.

Single readings are noise, so the average over a window must exceed the limit, and the warning ends only below `clear_at`.
A missing reading has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COVERAGE = 0.6  # share of the window that readings must cover
MAX_READINGS = 120


@dataclass(frozen=True)
class Threshold:
    """A warning begins at `raise_at` and ends past `clear_at`, both in the reading's unit."""

    name: str
    raise_at: float
    clear_at: float
    window_s: float
    en: str
    zh: str

    @property
    def upward(self) -> bool:
        """False for a minimum, such as free disk space."""
        return self.clear_at <= self.raise_at


@dataclass(frozen=True)
class ThresholdState:
    """(wall time, value) of the readings in the window, and since when the warning is active."""

    readings: tuple[tuple[float, float], ...] = ()
    since: float | None = None


def update(threshold: Threshold, state: ThresholdState, value: float | None, now: float) -> ThresholdState:
    kept = [(at, old) for at, old in state.readings if 0 <= now - at <= threshold.window_s]
    if value is not None:
        kept.append((now, value))
    kept = kept[-MAX_READINGS:]
    mean = _mean(kept, threshold, now)
    since = state.since
    if mean is not None:
        if since is None and _beyond(mean, threshold.raise_at, threshold.upward):
            since = now
        elif since is not None and not _beyond(mean, threshold.clear_at, threshold.upward):
            since = None
    return ThresholdState(tuple(kept), since)


def mean_of(state: ThresholdState) -> float | None:
    values = [value for _, value in state.readings]
    return sum(values) / len(values) if values else None


def _mean(readings: Sequence[tuple[float, float]], threshold: Threshold, now: float) -> float | None:
    if not readings or now - readings[0][0] < COVERAGE * threshold.window_s:
        return None
    return sum(value for _, value in readings) / len(readings)


def _beyond(value: float, limit: float, upward: bool) -> bool:
    return value >= limit if upward else value <= limit


def to_dict(state: ThresholdState) -> dict[str, object]:
    return {"readings": [list(pair) for pair in state.readings], "since": state.since}


def from_dict(raw: Mapping[str, object]) -> ThresholdState:
    readings = raw.get("readings") or []
    assert isinstance(readings, list)
    since = raw.get("since")
    return ThresholdState(
        tuple((float(at), float(value)) for at, value in readings), float(since) if isinstance(since, int | float) else None
    )
