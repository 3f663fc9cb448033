"""One run at a time, across processes; a run past its deadline is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.act.lock import FILE_NAME, Lock
from monitor.observe import processes

ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import sys, time; from pathlib import Path; from monitor.act.lock import Lock\n"
    "lock = Lock(Path(sys.argv[1])); print(lock.acquire(float(sys.argv[2]), 'checking') or 'acquired', flush=True)\n"
)


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator:
    started = []

    def hold(limit_s: float, then: str = "time.sleep(600)", name: str = "health_check.py", folder: Path = ROOT) -> subprocess.Popen:
        script = tmp_path / name
        script.write_text(HOLD + then)
        child = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(limit_s)], cwd=folder, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == "acquired\n"
        started.append(child)
        return child

    yield hold
    for child in started:
        child.kill()
        child.wait()


def test_a_second_run_is_refused_with_the_holder(other_run, tmp_path):
    child = other_run(60)

    holder = Lock(tmp_path).acquire(45, "checking")

    assert f"pid {child.pid}" in holder and "checking" in holder
    assert child.poll() is None


def test_a_run_past_its_deadline_is_killed_by_the_next(other_run, tmp_path):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ignores', flush=True); time.sleep(600)"
    child = other_run(0, code)
    assert child.stdout.readline() == "ignores\n"
    lock = Lock(tmp_path)

    assert lock.acquire(45, "checking") == ""
    assert child.wait(10) != 0
    lock.release()


def test_a_dead_holder_does_not_block(other_run, tmp_path):
    child = other_run(600)
    child.kill()
    child.wait()

    assert Lock(tmp_path).acquire(45, "checking") == ""


def test_a_restart_may_extend_the_deadline(other_run, tmp_path):
    child = other_run(0, "lock.extend(600, 'restarting api'); print('on', flush=True); time.sleep(600)")
    assert child.stdout.readline() == "on\n"

    assert "restarting api" in Lock(tmp_path).acquire(45, "checking")
    assert child.poll() is None


def test_a_server_started_under_the_lock_does_not_inherit_it(tmp_path):
    """Under `flock` in a shell a child inherits the descriptor and holds the lock for its lifetime."""
    lock = Lock(tmp_path)
    assert lock.acquire(45, "checking") == ""
    server = subprocess.Popen(["sleep", "60"])
    lock.release()

    try:
        assert Lock(tmp_path).acquire(45, "checking") == ""
    finally:
        server.kill()
        server.wait()


def test_a_reused_pid_is_not_killed(tmp_path):
    unrelated = subprocess.Popen(["sleep", "60"])
    (tmp_path / FILE_NAME).write_text(json.dumps({"pid": unrelated.pid, "start_time": 1, "until": 0, "what": "x"}))
    holder = Lock(tmp_path)
    assert holder.acquire(45, "checking") == ""  # nobody holds the lock itself

    assert unrelated.poll() is None
    unrelated.kill()
    unrelated.wait()


def test_a_process_that_does_not_hold_the_lock_is_not_killed(other_run, tmp_path):
    """The file names another checker than the one that holds the lock, here by a run that inherited its descriptor."""
    holder = other_run(0)
    (tmp_path / "elsewhere").mkdir()
    named = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "health_check.py"], cwd=ROOT)
    stat = processes.read_stat(named.pid)
    text = json.dumps({"pid": named.pid, "start_time": stat.start_time, "until": 0, "what": "checking"})
    (tmp_path / FILE_NAME).write_text(text)

    try:
        problem = Lock(tmp_path).acquire(45, "checking")

        assert f"pid {named.pid}" in problem and "left alone" in problem and "killed" not in problem
        assert named.poll() is None and holder.poll() is None
    finally:
        named.kill()
        named.wait()


@pytest.mark.parametrize("case", ["another program", "another folder"])
def test_a_holder_that_is_no_checker_of_this_folder_is_not_killed(other_run, tmp_path, case):
    child = other_run(0, name="backup.py") if case == "another program" else other_run(0, folder=tmp_path)

    problem = Lock(tmp_path).acquire(45, "checking")

    assert f"pid {child.pid}" in problem and "left alone" in problem
    assert child.poll() is None


def test_a_killed_run_whose_child_keeps_the_lock_is_said_to_be_killed(other_run, tmp_path):
    code = "import os, subprocess; os.set_inheritable(lock._file.fileno(), True)\n" \
        "print(subprocess.Popen(['sleep', '600'], close_fds=False).pid, flush=True); time.sleep(600)"
    child = other_run(0, code)
    heir = int(child.stdout.readline())

    try:
        problem = Lock(tmp_path).acquire(45, "checking")

        assert child.wait(10) != 0
        assert "has been killed" in problem and "cannot" not in problem
    finally:
        os.kill(heir, signal.SIGKILL)


def test_a_full_disk_does_not_prevent_a_run(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from monitor.act.lock import Lock\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))\n"
        "lock = Lock(Path(sys.argv[1])); print(repr(lock.acquire(5, 'x' * 9000))); lock.release(); print('released')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.stdout.split() == ["''", "released"], done.stderr


@pytest.mark.parametrize("kind", ["pipe", "loop", "dangling", "device"])
def test_what_is_no_file_in_its_place_does_not_let_two_runs_in(tmp_path, kind):
    path = tmp_path / FILE_NAME
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": FILE_NAME, "dangling": "/nowhere/file", "device": "/dev/zero"}[kind])
    first, second = Lock(tmp_path), Lock(tmp_path)

    assert first.acquire(45, "checking") == "" and "another run" in second.acquire(45, "checking")
    first.release()
