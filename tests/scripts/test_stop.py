"""stop.sh: stops exactly what was started, and reports what it found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from ports import free_port

from deploy import plain_settings, service
from monitor.observe import processes
from monitor.observe.processes import ProcessRecord, boot_id, foreign_owner, read_stat, write_record


def test_everything_is_stopped_and_a_second_stop_changes_nothing(project, machine):
    project.run("./start.sh")
    pids = [project.pid("api"), project.pid("web")]

    first = project.run("./stop.sh")
    second = project.run("./stop.sh")

    assert first.returncode == 0, first.stderr
    assert "The API is stopped" in first.stdout and "The page is stopped" in first.stdout
    assert not any(machine.runs(pid) for pid in pids)
    assert not any(machine.listens(port) for port in project.ports.values())
    assert not list((project.root / "logs").glob("*.pid.json"))
    assert second.returncode == 0
    assert second.stdout.count("was not running") == 2


def test_one_part_alone_is_stopped(project, machine):
    project.run("./start.sh")

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0
    assert not machine.listens(project.ports["api"]) and machine.listens(project.ports["web"])


def test_a_copied_folder_leaves_the_originals_processes_alone(project, machine):
    project.run("./start.sh api")
    pid = project.pid("api")
    copy = project.root.parent / "copy"
    shutil.copytree(project.root, copy)

    stopped = project.run(f"{copy}/stop.sh", GLM_API_PORT=str(free_port()), GLM_WEB_PORT=str(free_port()))

    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("was not running") == 2
    assert machine.runs(pid) and project.pid("api") == pid


def test_the_checker_starts_nothing_that_was_stopped_on_purpose(project, machine):
    project.run("./start.sh api")
    project.run("./stop.sh api")
    mark = project.root / "logs" / "api.stopped"
    assert mark.read_text() == "stop.sh\n"

    refused = project.run("./start.sh api", START_SH_CURE="1")

    assert refused.returncode == 1 and "stopped on purpose" in refused.stderr
    assert not machine.listens(project.ports["api"]) and mark.read_text() == "stop.sh\n"
    assert project.run("./start.sh api").returncode == 0
    assert not mark.exists()


def test_a_stop_that_fails_leaves_no_mark(tmp_path, monkeypatch, unrelated):
    other = unrelated("sleep", "600")
    write_record(tmp_path, "api", ProcessRecord(other.pid, read_stat(other.pid).start_time, 1, boot_id()))
    monkeypatch.setattr(service, "_end", lambda *_: False)

    assert service.stop(tmp_path, 0, {"api": free_port()}) == service.FAILED

    assert not processes.was_stopped(tmp_path, "api") and processes.read_record(tmp_path, "api") is not None


def test_without_room_for_a_mark_the_pid_file_becomes_it(tmp_path, monkeypatch):
    write_record(tmp_path, "api", ProcessRecord(4_000_000, 1, 1, boot_id()))

    def refuse(*_: object) -> bool:
        raise OSError("no space left")

    monkeypatch.setattr(processes, "mark_stopped", refuse)
    assert service.stop(tmp_path, 0, {"api": free_port()}) == 0

    assert processes.was_stopped_by_request(tmp_path, "api") and processes.read_record(tmp_path, "api") is None


def test_reused_pid_is_left_alone(project, unrelated):
    other = unrelated("sleep", "600")
    (project.root / "logs").mkdir()
    start_time = read_stat(other.pid).start_time
    write_record(
        project.root / "logs", "api", ProcessRecord(other.pid, start_time - 1, project.ports["api"], boot_id())
    )

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0
    assert "was not running" in stopped.stdout
    assert other.poll() is None


def test_record_of_another_boot_is_left_alone(project, unrelated):
    other = unrelated("sleep", "600")
    (project.root / "logs").mkdir()
    start_time = read_stat(other.pid).start_time
    write_record(
        project.root / "logs", "api", ProcessRecord(other.pid, start_time, project.ports["api"], "another-boot")
    )

    project.run("./stop.sh api")

    assert other.poll() is None


def test_unreadable_record_kills_nothing(project, unrelated):
    other = unrelated("sleep", "600")
    (project.root / "logs").mkdir()
    (project.root / "logs" / "api.pid.json").write_text(json.dumps({"pid": other.pid}))

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0
    assert other.poll() is None


def test_process_that_ignores_sigterm_is_killed(project, machine):
    project.run("./start.sh api", STAND_IN_API="stubborn")
    pid = project.pid("api")

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0, stopped.stderr
    assert not machine.runs(pid)


def test_a_server_that_is_given_a_delay_ends_by_itself(project):
    delay = {"GLM_DRAIN_DELAY_S": "10", "STAND_IN_API": "leaving"}
    project.run("./start.sh api", **delay)

    restarted = project.run("./start.sh --restart api", **delay)
    once = project.log("api").count("left by itself")
    stopped = project.run("./stop.sh api", **delay)

    assert (restarted.returncode, stopped.returncode) == (0, 0), restarted.stderr + stopped.stderr
    assert (once, project.log("api").count("left by itself")) == (1, 2)


@pytest.mark.parametrize(("given", "stop_s"), [({}, 10.0), ({"GLM_DRAIN_DELAY_S": "30"}, 40.0), ({"GLM_DRAIN_DELAY_S": "x", "GLM_DRAIN_S": "3"}, 3.0)])
def test_the_time_of_a_stop_is_read_from_settings_that_are_broken(given, stop_s, monkeypatch, tmp_path):
    for name, value in {"GLM_API_PORT": "none", **given}.items():
        monkeypatch.setenv(name, value)
    for name in {"GLM_DRAIN_S", "GLM_DRAIN_DELAY_S"} - set(given):
        monkeypatch.delenv(name, raising=False)

    read = plain_settings.read(tmp_path)

    assert (read.stop_s, read.certain) == (stop_s, False)


def test_frozen_process_is_ended(project, machine):
    project.run("./start.sh api")
    pid = project.pid("api")
    os.kill(pid, signal.SIGSTOP)

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0, stopped.stderr
    assert not machine.runs(pid)


def test_child_that_outlived_its_server_is_stopped_too(project, machine):
    project.run("./start.sh api", STAND_IN_API="parent")
    server = project.pid("api")
    child = int(project.log("api").split("child ")[1].split()[0])
    os.kill(server, signal.SIGKILL)
    machine.until(lambda: not machine.runs(server), "the server is gone")
    assert machine.runs(child)

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 0, stopped.stderr
    assert not machine.runs(child)


def test_a_port_held_by_another_process_is_reported_and_the_process_lives(project, unrelated, machine):
    port = project.ports["api"]
    other = unrelated(sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    machine.until(lambda: machine.listens(port), "the other process listens")

    stopped = project.run("./stop.sh api")

    assert stopped.returncode == 3
    assert f"Port {port} is still held by pid {other.pid}" in stopped.stderr
    assert other.poll() is None


def test_stop_works_when_the_settings_are_broken(project, machine):
    project.run("./start.sh")
    pids = [project.pid("api"), project.pid("web")]

    stopped = project.run("./stop.sh", GLM_NO_SUCH_NAME="1")

    assert stopped.returncode == 0, stopped.stderr
    assert not any(machine.runs(pid) for pid in pids)


def test_an_unknown_argument_is_rejected(project):
    assert project.run("./stop.sh everything").returncode == 2


VALUES = "GLM_API_PORT={api}\nGLM_WEB_PORT={web}\nGLM_DRAIN_S=0\nGLM_LOG_DIR=kept\n"
BROKEN = {
    "unknown name": lambda path, text: path.write_text(text + "GLM_NO_SUCH_NAME=1\n"),
    "open quote": lambda path, text: path.write_text('GLM_MODEL="abc\n' + text),
    "not numbers": lambda path, text: path.write_text("GLM_API_PORT=eighty\nGLM_DRAIN_S=none\n"),
    "utf-16": lambda path, text: path.write_text(text, encoding="utf-16"),
    "noise": lambda path, text: path.write_bytes(bytes(range(255, 0, -1)) * 20),
    "a folder": lambda path, text: path.mkdir(),
    "gone": lambda path, text: None,
}


@pytest.mark.parametrize("damage", BROKEN)
def test_stop_works_whatever_became_of_the_settings_file(project, machine, damage):
    text, port = VALUES.format(**project.ports), project.ports["api"]
    for name in ("GLM_API_PORT", "GLM_WEB_PORT", "GLM_DRAIN_S"):
        del project.env[name]
    (project.root / "kept").mkdir()
    # As start.sh launches it, without waiting for an answer.
    (project.root / ".env").write_text(text)
    launched = project.run(f"{sys.executable} -m deploy.service launch {project.root / 'kept'} api {port}")
    assert launched.returncode == 0, launched.stderr
    pid = json.loads((project.root / "kept" / "api.pid.json").read_text())["pid"]
    machine.until(lambda: machine.listens(port), "it has read its settings")
    (project.root / ".env").unlink()
    BROKEN[damage](project.root / ".env", text)

    stopped = project.run("timeout 60 ./stop.sh api")

    assert stopped.returncode in (0, 3), stopped.stderr  # 3: something else of this machine holds the default port
    assert f"The API is stopped (pid {pid})" in stopped.stdout
    assert not machine.runs(pid)
    assert not (project.root / "kept" / "api.pid.json").exists()


def test_the_wide_search_spares_another_service_of_the_folder(project, machine):
    """Only if the settings that can be read match nothing is everything of the folder stopped."""
    first, second = project.ports.values()
    for folder, port in (("logs", first), ("others", second)):
        (project.root / folder).mkdir()
        project.run(f"{sys.executable} -m deploy.service launch {project.root / folder} api {port}", GLM_API_PORT=str(port))
    spared = json.loads((project.root / "others" / "api.pid.json").read_text())["pid"]

    project.run("./stop.sh api", GLM_NO_SUCH_NAME="1")

    assert machine.runs(spared)
    os.kill(spared, signal.SIGKILL)


def test_processes_of_another_user_are_named(monkeypatch):
    here = read_stat(os.getpid())
    record = ProcessRecord(here.pid, here.start_time, 1, boot_id())
    assert foreign_owner(record) == ""

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)

    assert foreign_owner(record) == processes.user_name(Path("/proc/self").stat().st_uid)
