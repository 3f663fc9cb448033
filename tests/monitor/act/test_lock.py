"""One run at a time, across processes; and a run over its time is ended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.act.lock import FILE_NAME, Lock

ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import sys, time; from pathlib import Path; from monitor.act.lock import Lock\n"
    "lock = Lock(Path(sys.argv[1])); print(lock.take(float(sys.argv[2]), 'checking') or 'mine', flush=True)\n"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator:
    started = []

    def hold(for_s: float, then: str = "time.sleep(600)") -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD + then, str(tmp_path), str(for_s)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "mine\n"
        started.append(child)
        return child

    yield hold
    for child in started:
        child.kill()
        child.wait()


def test_the_second_is_told_who_has_it(other, tmp_path):
    child = other(60)

    said = Lock(tmp_path).take(45, "checking")

    assert f"pid {child.pid}" in said and "checking" in said
    assert child.poll() is None


def test_a_run_over_its_time_is_ended_by_the_next(other, tmp_path):
    child = other(0.01, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")

    time.sleep(0.05)
    lock = Lock(tmp_path)

    assert lock.take(45, "checking") == ""
    assert child.wait(10) != 0
    lock.release()


def test_a_holder_that_died_is_no_hindrance(other, tmp_path):
    child = other(600)
    child.kill()
    child.wait()

    assert Lock(tmp_path).take(45, "checking") == ""


def test_a_cure_may_take_longer_than_a_check(other, tmp_path):
    child = other(0.01, "lock.extend(600, 'restarting api'); print('on', flush=True); time.sleep(600)")
    assert child.stdout.readline() == "on\n"

    assert "restarting api" in Lock(tmp_path).take(45, "checking")
    assert child.poll() is None


def test_a_server_started_under_the_lock_does_not_keep_it(tmp_path):
    """The trap of `flock` in a shell: the child inherits the descriptor and holds the lock for its whole life."""
    lock = Lock(tmp_path)
    assert lock.take(45, "checking") == ""
    server = subprocess.Popen(["sleep", "60"])
    lock.release()

    try:
        assert Lock(tmp_path).take(45, "checking") == ""
    finally:
        server.kill()
        server.wait()


def test_a_pid_that_was_used_again_is_not_ended(tmp_path):
    stranger = subprocess.Popen(["sleep", "60"])
    (tmp_path / FILE_NAME).write_text(json.dumps({"pid": stranger.pid, "start_time": 1, "until": 0, "what": "x"}))
    holder = Lock(tmp_path)
    assert holder.take(45, "checking") == ""  # nobody holds the lock itself

    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_disk_that_is_full_keeps_nobody_from_checking(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from monitor.act.lock import Lock\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))\n"
        "lock = Lock(Path(sys.argv[1])); print(repr(lock.take(5, 'x' * 9000))); lock.release(); print('released')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.stdout.split() == ["''", "released"], done.stderr
