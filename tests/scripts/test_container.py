"""deploy/container.sh: the foreground process of a container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture
def container(project, machine):
    """The running entry point, with both servers up."""
    (project.root / ".venv" / "bin").mkdir(parents=True)
    (project.root / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (project.root / ".venv" / "bin" / "python").chmod(0o755)
    shown = (project.root.parent / "shown.txt").open("w")
    process = subprocess.Popen(
        ["deploy/container.sh"], cwd=project.root, env=project.env, stdout=shown, stderr=shown, stdin=subprocess.DEVNULL
    )
    machine.until(lambda: "Stop:" in (project.root.parent / "shown.txt").read_text(), "both answer")
    yield process
    process.kill()
    process.wait()
    shown.close()


def test_stop_signal_reaches_both_servers(container, project, machine):
    pids = [project.pid("api"), project.pid("web")]

    container.send_signal(signal.SIGTERM)

    assert container.wait(timeout=60) == 0
    assert not any(machine.runs(pid) for pid in pids)


def test_container_ends_when_one_server_ends(container, project, machine):
    web = project.pid("web")
    machine.until(lambda: "stand-in API starts" in (project.root.parent / "shown.txt").read_text(), "the logs are shown")

    os.kill(project.pid("api"), signal.SIGKILL)

    assert container.wait(timeout=60) == 1
    assert not machine.runs(web)
