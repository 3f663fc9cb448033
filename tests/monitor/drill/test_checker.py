"""The drill under cron: it changes the crontab entry, waits for runs that it does not start, and reads what they stored."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from monitor import schedule
from monitor.act.lock import Lock
from monitor.drill import checker
from monitor.drill.context import FaultContext
from monitor.drill.drill import _follow_each_other
from monitor.store.store import Store


@pytest.fixture
def crontab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table = tmp_path / "table"
    tool = tmp_path / "bin" / "crontab"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\ncase "$1" in\n-l) cat {table} 2>/dev/null || exit 1;;\n-r) rm -f {table};;\n-) cat > {table};;\nesac\n')
    tool.chmod(0o755)
    table.write_text("# mine\n")
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return table


@pytest.fixture
def runs(make_settings, monkeypatch):
    monkeypatch.setattr(checker, "CRON_LIMIT_S", 1.0)
    return checker.CronRuns(FaultContext(make_settings(1)))


def store_run(log_dir: Path, word: str) -> None:
    store = Store.open(log_dir)
    store.add_run(time.time(), {"duration_s": 0.1, "verdict": word, "service_healthy": True}, {}, {})
    store._connection.close()


def test_the_environment_of_a_fault_is_in_the_crontab_as_long_as_it_lasts(crontab, runs):
    runs._context.env["GLM_WEB_TOKEN"] = "other"
    runs.begin()

    assert "GLM_WEB_TOKEN=other" in crontab.read_text() and schedule.BEGIN in crontab.read_text()
    runs.end()
    assert crontab.read_text() == "# mine\n"


def test_only_a_run_after_the_injection_counts(crontab, runs):
    log_dir = runs._context.log_dir
    store_run(log_dir, "healthy")
    runs.begin()
    with pytest.raises(checker.CheckerSilent, match="cron made no run within 1 s"):
        runs.next()

    store_run(log_dir, "dead")
    assert runs.next()["verdict"] == "dead"


def test_a_run_counts_once_it_has_ended_and_looked_again(crontab, runs):
    """A run that restarts stores what it saw, then what it sees afterwards."""
    log_dir = runs._context.log_dir
    store_run(log_dir, "healthy")
    runs.begin()
    lock = Lock(log_dir)
    assert lock.acquire(60, "checking") == ""
    store_run(log_dir, "dead")

    def end() -> None:
        time.sleep(0.4)
        store_run(log_dir, "healthy")
        (log_dir / "health_check.lock").write_text("{}")

    thread = threading.Thread(target=end)
    thread.start()
    assert runs.next()["verdict"] == "healthy"
    thread.join()
    lock.release()


def test_the_memory_of_the_runs_is_watched(make_settings):
    context = FaultContext(make_settings(1))
    code = (
        "import sys, time; from pathlib import Path; from monitor.act.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.acquire(60, 'checking'); held = bytearray(300_000_000); time.sleep(1)\n"
    )
    with checker.memory_watched(context):
        subprocess.run([sys.executable, "-c", code, str(context.settings.log_dir)], cwd=schedule.ROOT, check=True)

    assert 300e6 < context.checker_peak_bytes < 400e6


def test_verdicts_in_order():
    assert _follow_each_other(("degraded", "broken"), ["healthy", "degraded", "degraded", "broken", "healthy"])
    assert not _follow_each_other(("degraded", "broken"), ["broken", "degraded"])
    assert _follow_each_other((), [])
