"""The mark of a stop that never happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.act import stop_marks
from monitor.observe import processes
from monitor.observe.processes import ROOT, ProcessRecord, boot_id, read_stat, write_record
from monitor.store.store import Store
from settings import Settings

OLD_S = 10.0 + stop_marks.MARGIN_S + 1


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(log_dir=tmp_path, drain_s=10.0, _env_file=None)  # type: ignore[call-arg]


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=ROOT)
    yield process
    process.kill()
    process.wait()


def mark(log_dir: Path, age_s: float, process: subprocess.Popen[bytes]) -> Path:
    stat = read_stat(process.pid)
    assert stat is not None
    write_record(log_dir, "api", ProcessRecord(process.pid, stat.start_time, 8080, boot_id(), str(ROOT)))
    processes.mark_stopped(log_dir, "api", "stop.sh")
    path = processes.stop_mark(log_dir, "api")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_server_that_runs_long_after_its_mark_was_not_stopped(settings, server) -> None:
    path = mark(settings.log_dir, OLD_S, server)
    store = Store.open(settings.log_dir)

    assert stop_marks.remove_stale(store, settings, time.time()) == ["api"]

    assert not path.exists()
    assert [(row["kind"], row["target"], row["outcome"]) for row in store.actions()] == [("unmark", "api", "done")]
    store.close()


@pytest.mark.parametrize("case", ["a stop in progress", "really stopped"])
def test_the_mark_of_a_stop_stays(settings, server, case) -> None:
    path = mark(settings.log_dir, OLD_S if case == "really stopped" else OLD_S - 20, server)
    if case == "really stopped":
        server.kill()
        server.wait()
    store = Store.open(settings.log_dir)

    assert stop_marks.remove_stale(store, settings, time.time()) == []

    assert path.exists()
    store.close()
