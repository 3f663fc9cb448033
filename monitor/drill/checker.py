"""The runs of the checker that a drill follows: its own, one after another, or those that cron makes.

Every run is a process of its own. With its own runs the drill sets the pace; under cron it only waits, reads the store, and
changes the environment of the runs in the crontab.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from monitor import schedule
from monitor.act import lock
from monitor.drill.context import FaultContext
from monitor.observe import processes
from monitor.store.store import Store
from settings import ROOT

CRON_LIMIT_S = 240.0  # two minutes, and a restart in each
POLL_S = 0.2
Report = dict[str, Any]


class CheckerSilent(RuntimeError):
    """The checker gave no report."""


class Runs(Protocol):
    period_s: float

    def begin(self) -> None:
        """Called when a fault is in force, and again when the environment has changed."""

    def next(self) -> Report:
        """The report of the next run; of its second look, if it restarted something. Raises CheckerSilent."""

    def end(self) -> None:
        """No run begins or is under way any more."""


class OwnRuns:
    """The drill starts the checker, every `period_s`."""

    def __init__(self, context: FaultContext, period_s: float) -> None:
        self.period_s = period_s
        self._context = context
        self._due = 0.0

    def begin(self) -> None:
        self._due = time.monotonic()

    def next(self) -> Report:
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + self.period_s
        return check(self._context)

    def end(self) -> None:
        pass


class CronRuns:
    """cron starts the checker, by the block that `install` writes."""

    period_s = 60.0

    def __init__(self, context: FaultContext) -> None:
        self._context = context
        self._seen: object = None

    def begin(self) -> None:
        self._seen = self._newest()[0]
        if schedule.put_cron_block(self._context.settings, self._context.env) != schedule.GOOD:
            raise CheckerSilent("the crontab cannot be written")

    def next(self) -> Report:
        deadline = time.monotonic() + CRON_LIMIT_S
        while time.monotonic() < deadline:
            found, report = self._newest()
            if report is not None and found != self._seen and holder(self._context.log_dir) is None:
                found, report = self._newest()  # whatever the run wrote last
                self._seen = found
                assert report is not None
                return report
            time.sleep(POLL_S)
        raise CheckerSilent(f"cron made no run within {CRON_LIMIT_S:.0f} s. {self._last_words()}")

    def end(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            schedule.uninstall(self._context.settings, "cron")
        deadline = time.monotonic() + CRON_LIMIT_S
        while time.monotonic() < deadline and (holder(self._context.log_dir) or _waits_to_begin()):
            time.sleep(POLL_S)

    def _newest(self) -> tuple[object, Report | None]:
        """(what distinguishes it from others, the newest report); the report is None if there is none that can be read."""
        with contextlib.suppress(sqlite3.Error, OSError, ValueError), contextlib.closing(Store.read_only(self._context.log_dir)) as store:
            rows = store.rows("SELECT id, at, report FROM runs WHERE report IS NOT NULL ORDER BY id DESC LIMIT 1")
            if rows:
                return (rows[0]["id"], rows[0]["at"]), rows[0]["report"]
        return None, None

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            return (self._context.settings.log_dir / "health_check.log").read_text(encoding="utf-8", errors="replace")[-500:]
        return ""


def check(context: FaultContext, *words: str) -> Report:
    """One run, started here; waits while another run holds the lock."""
    for _ in range(60):
        done = subprocess.run(
            [sys.executable, str(ROOT / "health_check.py"), "run", *words], cwd=ROOT, env={**os.environ, **context.env},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.stdout.startswith("{"):
            found = json.loads(done.stdout)
            if "api" in found.get("evidence", {}):
                return dict(found)
            raise CheckerSilent(f"the checker cannot run: {found['reasons']}")
        if done.returncode != 3:  # LOCKED
            raise CheckerSilent(f"the checker ended with code {done.returncode}: {done.stderr[-500:]}")
        time.sleep(1)
    raise CheckerSilent(f"the checker does not run: {done.stderr[-500:]}")


def holder(log_dir: Path) -> int | None:
    """The pid of the run that is under way. Reads the record in the lock file, since taking the lock could turn away a run."""
    try:
        raw = json.loads((log_dir / lock.FILE_NAME).read_text(encoding="utf-8"))
        stat = processes.read_stat(int(raw["pid"]))
        return stat.pid if stat is not None and stat.running and stat.start_time == raw["start_time"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _waits_to_begin() -> bool:
    """Whether cron has started a run of this folder that is still within its `sleep` or has not taken the lock yet."""
    script = str(ROOT / "health_check.py")
    for path in processes.PROC.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if script in text and " run --quiet" in text and int(path.parent.name) != os.getpid():
                return True
    return False


@contextlib.contextmanager
def memory_watched(context: FaultContext) -> Iterator[None]:
    """Keeps the peak memory of the runs that begin meanwhile in `context.checker_peak_bytes`."""
    context.checker_peak_bytes = 0
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            pid = holder(context.log_dir)
            if pid is not None:
                context.checker_peak_bytes = max(context.checker_peak_bytes, _peak_bytes(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def _peak_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in (processes.PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
