"""Settles a restart whose checker was killed in the middle: waits for its start.sh, and counts what has really happened.

A restart is counted before it starts anything. Without this, one that started nothing would delay the next by its back-off,
and no audit row would tell of it.
"""

from __future__ import annotations

import fcntl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from monitor.act.lock import Lock
from monitor.judge import engine_rules
from monitor.observe import processes
from monitor.store.state import WITH_FRONT, CheckerState
from monitor.store.store import Store
from settings import ROOT, Settings

NAME = "restarting"  # in the store, from the count until the audit row
START_LOCK = "logs/start.lock"  # held by start.sh
MARGIN_S = 60.0
POLL_S = 0.1
TARGETS = {**{part: target for target, part in WITH_FRONT.items()}, engine_rules.PART: "api"}


def begun(part: str, at: float, log_dir: Path) -> dict[str, Any]:
    """What to store before a restart. `at`: the time under which it is counted, in wall-clock seconds."""
    record = processes.read_record(log_dir, part)
    return {"part": part, "at": at, "before": [record.pid, record.start_time] if record is not None else None}


def settle(store: Store, state: CheckerState, settings: Settings, lock: Lock | None = None, root: Path = ROOT) -> str:
    """Empty if no restart was interrupted, otherwise what became of it. Saves the state."""
    found = store.get(NAME)
    if not isinstance(found, dict) or found.get("part") not in TARGETS:
        return ""
    limit_s = settings.start_timeout_s + MARGIN_S
    if lock is not None:
        lock.extend(limit_s + settings.check_budget_s, "waiting for the start.sh of a run that was killed")
    wait_for_start(root, limit_s)
    target = TARGETS[found["part"]]
    record = processes.read_record(settings.log_dir, found["part"])
    started = record is not None and [record.pid, record.start_time] != found["before"]
    if not started:
        _uncount(state, target, found["at"])
    what = "it had started a new process" if started else "it had started nothing, and does not count"
    incident = state.histories[target].incident
    with store.transaction():
        state.save(store)
        store.put(NAME, None)
        store.add_action(
            time.time(), target, "restart", "checker", "done" if started else "interrupted",
            f"the checker was killed during this restart: {what}", incident.id if incident else "",
        )  # fmt: skip
    return what


def wait_for_start(root: Path, limit_s: float) -> None:
    """Until no start.sh is at work, or the time is over."""
    deadline = time.monotonic() + limit_s
    try:
        with (root / START_LOCK).open("ab") as file:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(POLL_S)
    except OSError:
        return


def _uncount(state: CheckerState, target: str, at: float) -> None:
    limiter, history = state.limiters[target], state.histories[target]
    if at not in limiter.restarts:
        return
    state.limiters[target] = replace(limiter, restarts=tuple(one for one in limiter.restarts if one != at), step=max(0, limiter.step - 1))
    if history.incident is not None:
        incident = replace(history.incident, restarts=max(0, history.incident.restarts - 1))
        state.histories[target] = replace(history, incident=incident)
