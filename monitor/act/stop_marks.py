"""Removes the mark of a stop that never happened: of a stop.sh that was killed after it had marked a server and before it had ended it.

The server runs on, and would not be restarted after a crash because it seems stopped on purpose.
"""

from __future__ import annotations

import contextlib
import time

from monitor.judge import engine_rules
from monitor.observe import processes
from monitor.store.state import WITH_FRONT
from monitor.store.store import Store
from settings import Settings

MARGIN_S = 120.0  # beyond the longest stop: the time to drain, to kill, and for a slow machine


def remove_stale(store: Store, settings: Settings, now: float) -> list[str]:
    """The targets whose mark was removed, each with an audit row. `now`: wall-clock seconds."""
    removed = []
    for target, part in (*WITH_FRONT.items(), (engine_rules.PART, engine_rules.PART)):
        try:
            age_s = now - processes.stop_mark(settings.log_dir, part).stat().st_mtime
        except OSError:
            continue
        record = processes.read_record(settings.log_dir, part)
        # abs: a mark from the future was made before the clock was set back.
        if record is None or not processes.is_running(record) or abs(age_s) < settings.stop_s + MARGIN_S:
            continue
        processes.unmark_stopped(settings.log_dir, part)
        removed.append(target)
        with contextlib.suppress(Exception), store.transaction():
            store.add_action(
                time.time(), target, "unmark", "checker", "done",
                f"pid {record.pid} still runs {age_s / 60:.0f} minutes after it was marked as stopped on purpose; it is watched again",
            )  # fmt: skip
    return removed
