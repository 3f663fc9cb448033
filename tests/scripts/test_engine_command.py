"""The engine behind the API that GLM_ENGINE_COMMAND starts: a part of start.sh and stop.sh like the others."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from ports import free_port

from monitor.observe import processes


@pytest.fixture
def port(project) -> int:
    """Of the engine, which is a stand-in for the API with a child of its own."""
    number = free_port()
    project.env |= {
        "GLM_ENGINE_URL": f"http://127.0.0.1:{number}",
        "GLM_ENGINE_COMMAND": f"env GLM_API_PORT={number} STAND_IN_API=parent '{sys.executable}' -m api.server",
    }
    return number


def engine_members(project) -> list[int]:
    record = processes.read_record(project.root / "logs", "engine", project.root)
    return processes.members(record) if record else []


def test_the_engine_is_started_before_the_others_and_is_a_process_of_its_own(project, machine, port):
    first = project.run("./start.sh")
    pid = project.pid("engine")

    second = project.run("./start.sh")

    assert first.returncode == 0, first.stderr
    assert first.stdout.index("Starting engine") < first.stdout.index("Starting api") and f"Engine: http://127.0.0.1:{port}" in first.stdout
    assert machine.listens(port) and "stand-in API starts" in project.log("engine")
    assert second.returncode == 0 and second.stdout.count("Already running") == 3 and project.pid("engine") == pid
    assert len({project.pid(part) for part in ("engine", "api", "web")}) == 3


def test_the_end_takes_all_that_the_engine_has_started(project, machine, port):
    project.run("./start.sh")
    members = engine_members(project)

    stopped = project.run("./stop.sh")

    assert len(members) >= 3, "the process that start.sh records, the engine, and its child"
    assert stopped.returncode == 0, stopped.stderr
    assert "The engine is stopped" in stopped.stdout
    assert not machine.listens(port) and all(processes.read_stat(pid) is None or not processes.read_stat(pid).running for pid in members)


def test_an_engine_that_hangs_is_ended_too(project, machine, port):
    project.run("./start.sh")
    for pid in engine_members(project):
        os.kill(pid, signal.SIGSTOP)

    stopped = project.run("./stop.sh engine")

    assert stopped.returncode == 0, stopped.stderr
    assert not machine.listens(port) and machine.listens(project.ports["api"])


def test_one_that_has_lost_its_command_is_still_stopped(project, machine, port):
    project.run("./start.sh engine")
    del project.env["GLM_ENGINE_COMMAND"]

    refused = project.run("./start.sh engine")
    stopped = project.run("./stop.sh")

    assert (refused.returncode, "GLM_ENGINE_COMMAND is not set" in refused.stderr) == (2, True)
    assert stopped.returncode == 0 and not machine.listens(port)


def test_a_command_that_ends_at_once_fails_the_start_and_says_its_last_line(project, machine, port):
    project.env["GLM_ENGINE_COMMAND"] = "echo no such model; exit 3"

    started = project.run("./start.sh")

    assert started.returncode == 1 and "no such model" in started.stderr and "engine.log" in started.stderr
    assert not machine.listens(project.ports["api"]), "nothing is left half started"


def test_without_a_command_nobody_hears_of_an_engine(project):
    project.run("./start.sh")

    assert "ngine" not in project.run("./stop.sh").stdout
