"""A copy of the scripts with quick stand-in servers, run with the Python of these tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "start.sh",
    "stop.sh",
    "test.sh",
    "cgroup.py",
    "log_output.py",
    "settings.py",
    "requirements.txt",
    "requirements-quantized.txt",
    "requirements-test.txt",
    "deploy",
    "monitor",
)


@dataclass
class Project:
    """The copy, and the environment in which its scripts run."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def ports(self) -> dict[str, int]:
        return {"api": int(self.env["GLM_API_PORT"]), "web": int(self.env["GLM_WEB_PORT"])}

    def run(self, command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        # Files, not pipes: a server that inherited a pipe would make a test hang instead of fail.
        out, err = self.root.parent / "out.txt", self.root.parent / "err.txt"
        with out.open("w") as stdout, err.open("w") as stderr:
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.root, env={**self.env, **extra}, stdin=subprocess.DEVNULL,
                stdout=stdout, stderr=stderr, timeout=300,
            )  # fmt: skip
        return subprocess.CompletedProcess(command, done.returncode, out.read_text(), err.read_text())

    def pid(self, part: str) -> int:
        return json.loads((self.root / "logs" / f"{part}.pid.json").read_text())["pid"]

    def log(self, part: str) -> str:
        return (self.root / "logs" / f"{part}.log").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    root = tmp_path / "project"
    root.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "tests" / "scripts" / "stand_in", root, dirs_exist_ok=True)
    api_port, web_port = free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GLM_", "CONDA"))}
    # start.sh uses the Python of an active conda environment without changes.
    env = {
        **kept, "CONDA_PREFIX": sys.prefix, "CONDA_DEFAULT_ENV": "tests", "GLM_API_HOST": "127.0.0.1",
        "GLM_WEB_HOST": "127.0.0.1", "GLM_API_PORT": str(api_port), "GLM_WEB_PORT": str(web_port),
        "GLM_START_TIMEOUT_S": "60", "GLM_DRAIN_S": "0",
    }  # fmt: skip
    project = Project(root, env)
    yield project
    stopped = project.run("./stop.sh all", PATH=os.environ["PATH"])
    assert stopped.returncode in (0, 3), stopped.stderr


@pytest.fixture
def stub(project: Project) -> Callable[[str, str], None]:
    """Puts a program first on the project's PATH."""
    folder = project.root.parent / "stubs"
    folder.mkdir()
    project.env["PATH"] = f"{folder}:{project.env['PATH']}"

    def add(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    return add


@pytest.fixture
def unrelated(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts unrelated processes, which the scripts must not end."""
    started: list[subprocess.Popen] = []

    def start(*command: str) -> subprocess.Popen:
        started.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {limit_s} s: {what}"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.fixture
def machine() -> object:
    """Checks of ports and processes."""

    class Machine:
        listens = staticmethod(listens)
        runs = staticmethod(runs)
        until = staticmethod(until)

    return Machine()
