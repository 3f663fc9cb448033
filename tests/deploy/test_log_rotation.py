"""Debian's logrotate, and the checker's own cap, beside servers that write all the time: no line is lost, none is there twice."""

from __future__ import annotations

import grp
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import httpx
import pytest
from started_api import ROOT, WAIT_S, StartedApi, headers

from monitor.tell import exports

# Lines by logging and, as libraries do it, straight to standard error.
WRITER = """
import os, sys, logging, threading, log_output
log_output.set_up()
def write(thread):
    for number in range(20000):
        logging.info("event=line thread=%d number=%d", thread, number)
        if number % 100 == 0:
            os.write(2, b"raw thread=%d number=%d\\n" % (thread, number))
threads = [threading.Thread(target=write, args=(thread,)) for thread in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def shipped_rotation(logs: Path) -> list[str]:
    """The command that rotates by the shipped file, with these logs in place of those it names."""
    logrotate = which("logrotate") or "/usr/sbin/logrotate"
    shipped = (ROOT / "deploy" / "logrotate" / "glm").read_text(encoding="utf-8")
    assert "/opt/glm/logs/" in shipped
    conf = logs.parent / "logrotate.conf"
    shipped = shipped.replace("su owner group", "su root root").replace("rotate 5", "rotate 500")
    conf.write_text(shipped.replace("/opt/glm/logs/", f"{logs}/"))
    conf.chmod(0o644)
    return [logrotate, "--force", "--state", str(logs.parent / "state"), str(conf)]


def written_to(logs: Path, name: str) -> list[str]:
    """All lines of a log and of the files that it was rotated to."""
    lines = []
    for path in logs.glob(f"{name}*"):
        text = subprocess.run(["zcat", "-f", str(path)], capture_output=True, timeout=WAIT_S, check=True).stdout.decode()
        assert text.endswith("\n"), path
        lines += text.splitlines()
    return lines


def test_no_line_is_lost_or_there_twice_while_logrotate_works(logs: Path) -> None:
    command = shipped_rotation(logs)
    with (logs / "api.log").open("ab") as log:
        writer = subprocess.Popen([sys.executable, "-c", WRITER], cwd=ROOT, stdout=log, stderr=log)
    rotations = 0
    while writer.poll() is None:
        subprocess.run(command, check=True, timeout=WAIT_S)
        rotations += 1
    assert writer.returncode == 0 and rotations >= 5

    lines = written_to(logs, "api.log")
    numbered = [line.partition("event=line ")[2] for line in lines if "event=line" in line]
    assert len(numbered) == len(set(numbered)) == 40_000
    assert len([line for line in lines if line.startswith("raw ")]) == 400
    assert len(list(logs.glob("api.log*"))) > 5


def test_installed_as_the_docs_say_it_rotates_in_a_folder_that_a_group_may_write_to(logs: Path) -> None:
    """logrotate skips all logs of such a folder, unless it is told as whom to work."""
    (printed,) = re.findall(r"^(sed .*) \| sudo install .* /etc/logrotate.d/glm$", (ROOT / "docs" / "logs.md").read_text(), re.MULTILINE)
    (logs.parent / "deploy" / "logrotate").mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "logrotate" / "glm", logs.parent / "deploy" / "logrotate")
    names = ("api.log", "web.log", "health_check.log")
    for name in names:
        (logs / name).write_text("line\n")
    os.chown(logs, 0, grp.getgrnam("users").gr_gid)
    logs.chmod(0o775)

    conf = logs.parent / "installed"
    installed = subprocess.run(["bash", "-c", printed], cwd=logs.parent, capture_output=True, text=True, check=True).stdout
    conf.write_text(installed)
    conf.chmod(0o644)
    logrotate = which("logrotate") or "/usr/sbin/logrotate"
    for directive in ("", "su "):  # without the line, nothing; with it, everything
        conf.write_text(installed if directive else re.sub(r"^ *su .*\n", "", installed, flags=re.MULTILINE))
        command = [logrotate, "--force", "--state", str(logs.parent / "state"), str(conf)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert ("insecure permissions" in done.stderr) is (not directive), done.stderr
        assert sorted(path.name for path in logs.iterdir()) == sorted(f"{name}.1" if directive else name for name in names)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedApi]:
    folder = tmp_path_factory.mktemp("bundle") / "logs"
    folder.mkdir()
    with StartedApi(folder, GLM_MODEL="models/shapes") as started:
        yield started


def test_the_real_api_goes_on_in_a_new_file_with_every_request_logged_once(api: StartedApi) -> None:
    command, sent = shipped_rotation(api.folder), 600

    def ask(number: int) -> None:
        named = {**headers(), "x-request-id": f"rotated-{number}"}
        assert client.get("/v1/models", headers=named).status_code == 200

    with httpx.Client(base_url=api.url, timeout=WAIT_S) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(sent)]
        while not all(each.done() for each in asked):
            subprocess.run(command, check=True, timeout=WAIT_S)
            time.sleep(0.05)
        for each in asked:
            each.result()

    deadline = time.monotonic() + WAIT_S
    while len(found := [line for line in written_to(api.folder, "api.log") if "request=rotated-" in line]) < sent:
        assert time.monotonic() < deadline, len(found)
        time.sleep(0.1)
    assert len({line.partition("request=rotated-")[2].split()[0] for line in found}) == len(found) == sent
    subprocess.run(command, check=True, timeout=WAIT_S)
    assert not (api.folder / "api.log").exists()
    httpx.get(f"{api.url}/v1/models", timeout=WAIT_S)
    while not (api.folder / "api.log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_logrotate_the_checker_keeps_the_logs_small_and_loses_nothing_at_the_change(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "RAW_LIMIT_BYTES", 300_000)
    with (logs / "api.log").open("ab") as log:
        writer = subprocess.Popen([sys.executable, "-c", WRITER], cwd=ROOT, stdout=log, stderr=log)
    seen: set[str] = set()
    changes = 0
    while writer.poll() is None:
        before = (logs / "api.log").stat().st_ino if (logs / "api.log").exists() else 0
        exports._cap(logs / "api.log")
        if (logs / "api.log.old").exists() and (logs / "api.log.old").stat().st_ino == before:
            changes += 1
            time.sleep(0.05)  # the checker's next run is a minute later
            seen.update((logs / "api.log.old").read_text().splitlines())
    seen.update((logs / "api.log").read_text().splitlines())

    numbered = {line.partition("event=line ")[2] for line in seen if "event=line" in line}
    assert changes >= 2 and len(numbered) == 40_000


def test_what_does_not_follow_is_cut_off_where_it_writes(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "RAW_LIMIT_BYTES", 1000)
    with (logs / "api.log").open("ab", buffering=0) as other:
        for number in range(400):
            other.write(b"%09d\n" % number)
            exports._cap(logs / "api.log")
            assert sum(path.stat().st_size for path in logs.iterdir()) <= 3 * 1000
        assert (logs / "api.log.old").read_bytes().endswith(b"%09d\n" % 399)
