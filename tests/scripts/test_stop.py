"""stop.sh: ends exactly what was started, and says what it found."""

from __future__ import annotations

import json
import os
import signal
import sys

from monitor.observe.processes import ProcessRecord, boot_id, read_stat, write_record


def test_everything_is_gone_afterwards_and_a_second_stop_changes_nothing(project, world):
    project.run("./start.sh")
    pids = [project.pid("api"), project.pid("web")]

    first = project.run("./stop.sh")
    second = project.run("./stop.sh")

    assert first.returncode == 0, first.stderr
    assert "The API is stopped" in first.stdout and "The page is stopped" in first.stdout
    assert not any(world.runs(pid) for pid in pids)
    assert not any(world.listens(port) for port in project.ports.values())
    assert not list((project.root / "logs").glob("*.pid.json"))
    assert second.returncode == 0
    assert second.stdout.count("was not running") == 2


def test_one_part_alone_is_stopped(project, world):
    project.run("./start.sh")

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0
    assert not world.listens(project.ports["api"]) and world.listens(project.ports["web"])


def test_reused_pid_is_left_alone(project, stranger):
    other = stranger("sleep", "600")
    (project.root / "logs").mkdir()
    start_time = read_stat(other.pid).start_time
    write_record(
        project.root / "logs", "api", ProcessRecord(other.pid, start_time - 1, project.ports["api"], boot_id())
    )

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0
    assert "was not running" in stopped.stdout
    assert other.poll() is None


def test_record_of_another_boot_is_left_alone(project, stranger):
    other = stranger("sleep", "600")
    (project.root / "logs").mkdir()
    start_time = read_stat(other.pid).start_time
    write_record(
        project.root / "logs", "api", ProcessRecord(other.pid, start_time, project.ports["api"], "another-boot")
    )

    project.run("./stop.sh api")

    assert other.poll() is None


def test_unreadable_record_kills_nothing(project, stranger):
    other = stranger("sleep", "600")
    (project.root / "logs").mkdir()
    (project.root / "logs" / "api.pid.json").write_text(json.dumps({"pid": other.pid}))

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0
    assert other.poll() is None


def test_process_that_ignores_the_request_is_forced(project, world):
    project.run("./start.sh api", STAND_IN_API="stubborn")
    pid = project.pid("api")

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0, stopped.stderr
    assert not world.runs(pid)


def test_frozen_process_is_ended(project, world):
    project.run("./start.sh api")
    pid = project.pid("api")
    os.kill(pid, signal.SIGSTOP)

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0, stopped.stderr
    assert not world.runs(pid)


def test_child_that_outlived_its_server_is_ended_too(project, world):
    project.run("./start.sh api", STAND_IN_API="parent")
    server = project.pid("api")
    child = int(project.log("api").split("child ")[1].split()[0])
    os.kill(server, signal.SIGKILL)
    world.until(lambda: not world.runs(server), "the server is gone")
    assert world.runs(child)

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0, stopped.stderr
    assert not world.runs(child)


def test_port_held_by_a_stranger_is_reported_and_the_stranger_lives(project, stranger, world):
    port = project.ports["api"]
    other = stranger(sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    world.until(lambda: world.listens(port), "the stranger listens")

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 3
    assert f"Port {port} is still held by pid {other.pid}" in stopped.stderr
    assert other.poll() is None


def test_stop_works_when_the_settings_are_broken(project, world):
    project.run("./start.sh")
    pids = [project.pid("api"), project.pid("web")]

    stopped = project.run("./stop.sh", GLM_NO_SUCH_NAME="1")

    assert stopped.returncode == 0, stopped.stderr
    assert not any(world.runs(pid) for pid in pids)


def test_unknown_word_is_refused(project):
    assert project.run("./stop.sh everything").returncode == 2
