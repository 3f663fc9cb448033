"""deploy/container.sh, the foreground process of a container, with quick stand-ins for the servers and the checker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKER = """\
import pathlib, sys, time
assert sys.argv[1:] == ["loop"]
with open("checkers.txt", "a") as seen:
    print(__import__("os").getpid(), file=seen)
time.sleep(600)
"""


@pytest.fixture
def shown(project):
    return project.root.parent / "shown.txt"


@pytest.fixture
def container(project, machine, shown):
    """Starts the entry point and waits for both servers."""
    (project.root / ".venv" / "bin").mkdir(parents=True)
    (project.root / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (project.root / ".venv" / "bin" / "python").chmod(0o755)
    (project.root / "health_check.py").write_text(CHECKER)
    started = []

    def start(*arguments: str, **extra: str) -> subprocess.Popen:
        with shown.open("w") as file:
            started.append(subprocess.Popen(
                ["deploy/container.sh", *arguments], cwd=project.root, env={**project.env, **extra}, stdout=file, stderr=file,
                stdin=subprocess.DEVNULL,
            ))  # fmt: skip

        def ready() -> bool:
            assert started[-1].poll() is None, "the container has ended"
            return "Stop:" in shown.read_text() and bool(checkers(project))

        machine.until(ready, "both answer, and the checker runs")
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for pid in checkers(project):
        if machine.runs(pid):
            os.kill(pid, signal.SIGKILL)


def checkers(project) -> list[int]:
    seen = project.root / "checkers.txt"
    return [int(line) for line in seen.read_text().split()] if seen.exists() else []


def test_stop_signal_ends_both_servers_and_the_checker(container, project, machine, shown):
    keys = project.root.parent / "keys.env"
    (project.root / "logs").mkdir(exist_ok=True)
    (project.root / "logs" / "health.json").write_text('{"verdict": "healthy"}')
    process = container(GLM_ENV_FILE=str(keys))
    pids = [project.pid("api"), project.pid("web"), *checkers(project)]
    machine.until(lambda: "stand-in API starts" in shown.read_text(), "the logs are shown")

    process.send_signal(signal.SIGTERM)

    assert process.wait(timeout=60) == 0
    machine.until(lambda: not any(machine.runs(pid) for pid in pids), "all have ended")
    assert "GLM_API_KEY=" in keys.read_text() and keys.stat().st_mode & 0o777 == 0o600
    assert not (project.root / "logs" / "health.json").exists(), "the verdict of another container is no verdict of this one"


def test_a_server_that_comes_back_and_one_that_was_stopped_do_not_end_it(container, project, machine):
    process = container("60")
    first = checkers(project)[0]
    os.kill(first, signal.SIGKILL)
    os.kill(project.pid("api"), signal.SIGKILL)

    machine.until(lambda: len(checkers(project)) == 2, "the checker was started again")
    assert process.poll() is None, "a look at the processes has found the API gone"
    assert project.run("./start.sh api", START_SH_CURE="1").returncode == 0
    assert project.run("./stop.sh api").returncode == 0
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=11)
    assert machine.runs(project.pid("web"))
    assert project.run("./stop.sh web").returncode == 0

    assert process.wait(timeout=60) == 0


def test_a_server_that_stays_away_ends_it(container, project, machine):
    process = container("1")
    web = project.pid("web")

    os.kill(project.pid("api"), signal.SIGKILL)

    assert process.wait(timeout=60) == 1
    assert not machine.runs(web)


def test_a_start_that_fails_ends_it_with_nothing_left(container, project, machine, shown):
    with pytest.raises(AssertionError, match="the container has ended"):
        container(STAND_IN_API="die")

    assert "there is no such model: nowhere/at-all" in shown.read_text()
    assert not machine.listens(project.ports["web"]) and checkers(project) == []


def test_another_command_is_run_instead(project):
    done = subprocess.run(
        ["deploy/container.sh", "echo", "instead"], cwd=project.root, env=project.env, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (0, "instead\n")


def test_a_folder_of_keys_that_cannot_be_written_is_named(project, tmp_path):
    file = Path("/proc/none/.env")
    done = subprocess.run(
        ["deploy/container.sh"], cwd=project.root, env={**project.env, "GLM_ENV_FILE": str(file)}, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    assert f"{file} cannot be written" in done.stderr and f"chown {os.getuid()}:{os.getgid()}" in done.stderr
