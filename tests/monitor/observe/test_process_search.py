"""Finding a server again without its pid file, and taking no other process for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ports import free_port

from monitor.judge.evidence import HealthReply, Identity, SelfReport
from monitor.observe import observe, processes
from monitor.observe.process_search import MARK, find_record, search
from monitor.observe.processes import ProcessRecord, boot_id, id_of, read_record, read_stat, record_path, write_record

SERVER = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listens", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with an `api.server` that only listens."""
    return make_project(tmp_path / "project")


def make_project(root: Path) -> Path:
    (root / "api").mkdir(parents=True)
    (root / "api" / "server.py").write_text(SERVER)
    (root / "logs").mkdir()
    return root


@pytest.fixture
def serve() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the server of a folder as start.sh does; with `mark` as this version does."""
    started: list[subprocess.Popen] = []

    def start(root: Path, port: int, mark: bool = True, session: bool = True, log: str = "api.log") -> subprocess.Popen:
        noted = {"port": port, "log_dir": str(root / "logs"), "log_offset": 7, "code": "abc"}
        path = root / "logs" / log
        with path.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "api.server", str(port)], cwd=root, stdout=output, stderr=output,
                start_new_session=session, env={**os.environ, **({MARK: json.dumps(noted)} if mark else {})},
            )  # fmt: skip
        started.append(process)
        deadline = time.monotonic() + 30
        while b"listens" not in path.read_bytes():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("damage", ["deleted", "folder deleted", "empty", "text", "list", "other host", "dead process"])
def test_a_lost_pid_file_is_written_anew(folder, serve, damage):
    port, logs = free_port(), folder / "logs"
    process = serve(folder, port)
    true = ProcessRecord(process.pid, read_stat(process.pid).start_time, port, boot_id(), str(folder), 7, "abc", id_of(folder))
    path = record_path(logs, "api")
    if damage == "folder deleted":
        (logs / "api.log").unlink()
        logs.rmdir()
    elif damage == "other host":
        write_record(logs, "api", ProcessRecord(true.pid, true.start_time, port, "another-boot", str(folder)))
    elif damage == "dead process":
        write_record(logs, "api", ProcessRecord(4_000_000, 1, port, boot_id(), str(folder)))
    elif damage != "deleted":
        path.write_text({"empty": "", "text": '{"pid": 3', "list": "[]"}[damage])

    assert find_record(logs, "api", port, folder) == true
    assert read_record(logs, "api", folder) == true


def test_a_server_of_an_earlier_version_is_found_by_its_port_or_its_log(folder, serve):
    port = free_port()
    process = serve(folder, port, mark=False)

    by_port = search("api", folder / "elsewhere", port, folder)
    by_log = search("api", folder / "logs", 1, folder)

    assert [found.record.pid for found in by_port] == [found.record.pid for found in by_log] == [process.pid]
    assert by_log[0].record.port == port
    assert by_log[0].record.code == ""


def test_a_second_service_of_the_folder_is_told_apart(folder, serve):
    process = serve(folder, free_port())

    assert search("api", folder / "elsewhere", 1, folder) == []
    assert [found.record.pid for found in search("api", root=folder)] == [process.pid]


def test_nothing_else_is_taken_for_ours(folder, serve, tmp_path, monkeypatch):
    port = free_port()
    other = make_project(tmp_path / "other")
    serve(other, port)  # another checkout, on our port
    serve(folder, free_port(), session=False)  # not started by start.sh

    assert search("api", folder / "logs", port, folder) == []
    assert search("web", other / "logs", port, other) == []
    assert find_record(folder / "logs", "api", port, folder) is None
    monkeypatch.setattr(os, "geteuid", lambda: 54321)  # as another user sees it
    assert search("api", other / "logs", port, other) == []


def test_a_pid_file_that_names_another_process_of_the_folder_gives_way(folder, serve):
    """As where the pid files of both parts were exchanged."""
    port = free_port()
    process = serve(folder, port)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=folder)
    write_record(folder / "logs", "api", ProcessRecord(other.pid, read_stat(other.pid).start_time, port, boot_id(), str(folder)))

    try:
        assert find_record(folder / "logs", "api", port, folder).pid == process.pid
        assert read_record(folder / "logs", "api", folder).pid == process.pid
    finally:
        other.kill()
        other.wait()


def test_without_a_process_the_pid_file_is_what_it_was(folder):
    gone = ProcessRecord(4_000_000, 1, 8080, boot_id(), str(folder))
    write_record(folder / "logs", "api", gone)

    assert find_record(folder / "logs", "api", 8080, folder) == gone
    assert find_record(folder / "logs", "web", 8081, folder) is None


def test_a_copy_of_the_folder_has_no_part_in_the_original(folder, serve, tmp_path):
    port = free_port()
    process = serve(folder, port)
    own = find_record(folder / "logs", "api", port, folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)

    assert read_record(copy / "logs", "api", copy) is None
    assert find_record(copy / "logs", "api", port, copy) is None
    assert own is not None and own.pid == process.pid
    process.kill()
    process.wait()
    assert read_record(copy / "logs", "api", copy) is None, "its end is none of the copy's either"
    assert read_record(folder / "logs", "api", folder) == own


def test_a_moved_folder_keeps_its_processes(folder, serve, tmp_path):
    port = free_port()
    process = serve(folder, port)
    recorded = find_record(folder / "logs", "api", port, folder)
    moved, link = tmp_path / "moved", tmp_path / "link"
    folder.rename(moved)
    link.symlink_to(moved)

    assert read_record(moved / "logs", "api", moved) == read_record(link / "logs", "api", link) == recorded
    process.kill()
    process.wait()
    assert read_record(moved / "logs", "api", moved) == read_record(link / "logs", "api", link) == recorded, "so that its end is seen"


def test_a_copy_in_the_place_of_the_original_does_not_take_its_process(folder, serve, tmp_path):
    port = free_port()
    serve(folder, port)
    recorded = find_record(folder / "logs", "api", port, folder)
    moved = tmp_path / "moved"
    folder.rename(moved)
    shutil.copytree(moved, folder)

    assert read_record(folder / "logs", "api", folder) is None
    assert read_record(moved / "logs", "api", moved) == recorded


def test_a_process_of_another_copy_that_answers_is_not_ours(folder, serve, tmp_path, monkeypatch):
    process = serve(folder, free_port())
    one = Identity(process.pid, read_stat(process.pid).start_time, boot_id())

    monkeypatch.setattr(processes, "ROOT", folder)
    assert observe._other(HealthReply("answered", report=SelfReport(one)), None) == ""
    monkeypatch.setattr(processes, "ROOT", make_project(tmp_path / "copy"))
    assert observe._other(HealthReply("answered", report=SelfReport(one)), None) == f"process {process.pid}"
    elsewhere = HealthReply("answered", report=SelfReport(Identity(process.pid, 1, boot_id())))
    assert observe._other(elsewhere, None) == "", "the pid of another pid namespace says nothing"
