"""Saves evidence before a restart in `logs/incidents/<id>/<n>/`: bounded, without prompts, images or secrets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monitor.observe import processes
from monitor.observe.small_file import open_file, read_small
from monitor.tell import report
from monitor.tell.redaction import redact
from settings import Settings

FOLDER = "incidents"
KEEP = 10
FILE_LIMIT_BYTES = 512 * 1024
LOG_LINES = 200
STACKS_WAIT_S = 3.0
PROC_FILES = ("status", "wchan", "stack", "limits", "io", "cgroup", "oom_score")


def save(settings: Settings, incident: str, part: str, evidence: dict[str, Any], runs: list[dict[str, Any]]) -> Path | None:
    """The folder of the bundle; None if the disk is not writable, which must not prevent a restart."""
    root = settings.log_dir / FOLDER
    folder = root / incident
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder / str(sum(1 for entry in folder.iterdir() if entry.is_dir()) + 1)
        folder.mkdir()
        _keep_newest(root)
    except OSError:
        return None
    record = processes.read_record(settings.log_dir, part)
    pid = record.pid if record is not None and processes.is_running(record) else None

    def put(name: str, make: Callable[[], str]) -> None:
        try:
            text = make()
        except OSError as error:
            text = f"could not be read: {error}\n"
        try:
            (folder / name).write_text(redact(text[-FILE_LIMIT_BYTES:], settings), encoding="utf-8", errors="replace")
        except OSError:
            return

    put("evidence.json", lambda: report.to_json(evidence))
    put("runs.json", lambda: json.dumps(report.finite(runs), indent=1, ensure_ascii=False))
    put("log.txt", lambda: _tail(settings.log_dir / f"{part}.log"))
    if part == "api":
        put("heartbeat.json", lambda: read_small(settings.log_dir / "api.heartbeat.json"))
    if pid is not None:
        if part != "front":
            put("stacks.txt", lambda: stacks(settings.log_dir, pid))
        put("process.txt", lambda: _process(pid))
    return folder


def stacks(log_dir: Path, pid: int) -> str:
    """The stacks of all threads, written by faulthandler in the process, which works even while no Python code runs."""
    if not _handles(pid, signal.SIGUSR1):
        return "the process does not handle SIGUSR1, which would kill it\n"
    path = log_dir / "api.stacks.txt"
    before = path.stat().st_size if path.exists() else 0
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + STACKS_WAIT_S
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = path.stat().st_size if path.exists() else 0
        if now > before and now == size:  # it has stopped growing
            break
        size = now
    if size <= before:
        return "the process wrote no stacks; it may be stopped by a signal or stuck in the kernel\n"
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        file.seek(before)
        return file.read(FILE_LIMIT_BYTES).decode("utf-8", "replace")


def _handles(pid: int, number: int) -> bool:
    for line in (processes.PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & (1 << (number - 1)))
    return False


def _process(pid: int) -> str:
    folder = processes.PROC / str(pid)
    parts = [f"command: {processes.command_of(pid)}"]
    for name in PROC_FILES:
        parts.append(f"== {name}\n{_read(folder / name)}")
    threads = sorted(os.listdir(folder / "task"), key=int)
    states = [f"{t} {_read(folder / 'task' / t / 'comm').strip()} {_state(folder / 'task' / t)} "
              f"{_read(folder / 'task' / t / 'wchan').strip()}" for t in threads]  # fmt: skip
    parts.append("== threads\n" + "\n".join(states))
    links = []
    for name in sorted(os.listdir(folder / "fd"), key=int)[:500]:
        try:
            links.append(f"{name} -> {os.readlink(folder / 'fd' / name)}")
        except OSError:
            continue
    parts.append("== open files\n" + "\n".join(links))
    parts.append("== sockets\n" + _read(folder / "net" / "tcp")[:20000])
    return "\n".join(parts)


def _state(folder: Path) -> str:
    return _read(folder / "stat").rpartition(")")[2].split(" ")[1:2][0] if (folder / "stat").exists() else "?"


def _read(path: Path) -> str:
    try:
        return read_small(path, FILE_LIMIT_BYTES)
    except OSError as error:
        return f"({error.strerror or error})"


def _tail(path: Path) -> str:
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - FILE_LIMIT_BYTES))
        return "\n".join(file.read(FILE_LIMIT_BYTES).decode("utf-8", "replace").splitlines()[-LOG_LINES:])


def _keep_newest(root: Path) -> None:
    folders = sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime)
    for old in folders[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
