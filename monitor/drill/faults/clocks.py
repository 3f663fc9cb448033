"""Faults of time: a clock that jumps, a heartbeat from the future."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from monitor.drill.context import FaultContext
from monitor.drill.faults.processes import freeze, kill
from monitor.observe.observe import HEARTBEAT
from monitor.store.store import Store

HOUR_S, DAY_S = 3600, 86400
AHEAD_S = 1e6


@contextmanager
def jump_an_hour(context: FaultContext) -> Iterator[None]:
    """The API is killed while the wall clock of the checker jumps ahead by an hour."""
    with _shifted(context, HOUR_S), kill(context):
        yield


@contextmanager
def jump_a_day(context: FaultContext) -> Iterator[None]:
    """The wall clock of the checker jumps further ahead than runs are kept."""
    context.rows_before = count_runs(context, time.time())
    with _shifted(context, int(1.1 * DAY_S)):
        yield


@contextmanager
def _shifted(context: FaultContext, seconds: int) -> Iterator[None]:
    context.env["DRILL_CLOCK_S"] = str(seconds)
    try:
        yield
    finally:
        context.env.pop("DRILL_CLOCK_S", None)


def count_runs(context: FaultContext, until: float) -> int:
    with closing(Store.read_only(context.log_dir)) as store:
        return int(store.execute("SELECT COUNT(*) FROM runs WHERE at <= ?", until).fetchone()[0])


@contextmanager
def beat_in_the_future(context: FaultContext) -> Iterator[None]:
    """The API is stopped, and its heartbeat file has times that are yet to come."""
    with freeze(context):
        path = context.settings.log_dir / HEARTBEAT
        beat = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(beat | {"beat_at": beat["beat_at"] + AHEAD_S, "written_at": beat["written_at"] + AHEAD_S}), encoding="utf-8")
        yield
