"""Finds the processes that start.sh started when their pid file is gone, damaged or stale.

A process is ours only if all of this holds: it runs `-m <part>.server` (`module_of`) in the project's folder, as this user, in this pid
namespace, and leads a session, as start.sh makes it. Which of several it is, its mark says: start.sh puts the contents of
the pid file into its environment. A process without a mark was started by an earlier version and is known by its port or
its log file. The nginx in front of replicas (part `front`) writes its title over its environment; the configuration that the
title names says whose it is. Standard library only, and no syntax newer than Python 3.8, because stop.sh uses it without the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.observe import ports, processes
from monitor.observe.processes import DELETED, PROC, ProcessRecord

ENV_FILE, LAST_GOOD = "GLM_ENV_FILE", "last-good.env"  # as in settings.py, which stop.sh can do without
FRONT_CONF = "front.nginx.conf"  # in the log folder
FRONT_COMMAND = re.compile(rf"^(?:nginx: master process )?\S*nginx .*-c (\S+)/{re.escape(FRONT_CONF)}")
MARK = "START_SH_RECORD"  # not GLM_*: settings.py refuses unknown names


@dataclass(frozen=True)
class FoundProcess:
    """A running process of ours. `log` is the file it writes to, `mark` what start.sh noted; both may be empty."""

    record: ProcessRecord
    log: str
    mark: dict[str, Any]

    @property
    def log_dir(self) -> Path | None:
        folder = self.mark.get("log_dir") or os.path.dirname(self.log)
        return Path(folder) if folder else None


def find_record(
    log_dir: Path, part: str, port: int | None = None, root: Path | None = None, remembered: ProcessRecord | None = None
) -> ProcessRecord | None:
    """The pid file's record if its process runs; otherwise that of the running process, with the pid file written anew.

    If none runs, what the pid file says, or without one the `remembered` record of an earlier run; None if it was stopped on
    purpose. The pid file of another part, or of a process that only works in this folder, gives way to the process that is found.
    `port`: the configured one; without it only the log folder identifies a process.
    """
    recorded = processes.read_record(log_dir, part, root)
    if recorded is not None and elsewhere(recorded.pid, log_dir, root):  # a copy of another installation's pid file
        recorded = None
    runs = recorded is not None and processes.is_running(recorded)
    if recorded is not None and runs and _is_ours(recorded.pid, part, root or processes.ROOT):
        return recorded
    found = search(part, log_dir, port, root)
    if recorded is not None and runs and not found:  # such as a process whose command line is not readable
        return recorded
    if not found and processes.was_stopped(log_dir, part):
        return None
    if not found and recorded is None and remembered is not None:
        with contextlib.suppress(OSError):
            processes.write_record(log_dir, part, remembered)
        return remembered
    if not found:
        return recorded
    _write_anew(log_dir, part, found[0].record)
    return found[0].record


def search(part: str, log_dir: Path | None = None, port: int | None = None, root: Path | None = None) -> list[FoundProcess]:
    """Our running processes of this part, the newest first. Without `log_dir` and `port` every one of this folder."""
    root = root or processes.ROOT
    found = []
    for stat in processes.all_stats():
        if stat.running and stat.session == stat.pid and _is_ours(stat.pid, part, root):
            process = _describe(stat, port, root)
            if _belongs(process, part, log_dir, port) and not (log_dir and elsewhere(stat.pid, log_dir, root)):
                found.append(process)
    return sorted(found, key=lambda process: process.record.start_time, reverse=True)


def mark_of(pid: int) -> dict[str, Any]:
    """What start.sh noted in the environment of the process; empty for an earlier version or another user's process."""
    with contextlib.suppress(ValueError):
        mark = json.loads(_environment_of(pid).get(MARK, "{}"))
        return mark if isinstance(mark, dict) else {}
    return {}


def _environment_of(pid: int) -> dict[str, str]:
    """Empty if it is not readable."""
    try:
        raw = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    entries = (entry.decode("utf-8", "surrogateescape").partition("=") for entry in raw.split(b"\0"))
    return {name: value for name, _, value in entries}


def elsewhere(pid: int, log_dir: Path, root: Path | None = None) -> str:
    """The log folder of the installation that the process belongs to, if that is another one than ours; otherwise empty.

    Two installations in one project folder have other log folders and other settings files (GLM_ENV_FILE). With one settings
    file it is the same installation, whose log folder has changed.
    """
    mark = mark_of(pid)
    folder = str(mark.get("log_dir") or "")
    if not folder or os.path.realpath(folder) == os.path.realpath(str(log_dir)):
        return ""
    root = root or processes.ROOT
    theirs, ours = _settings_file(_environment_of(pid).get(ENV_FILE, ""), root), _settings_file(os.environ.get(ENV_FILE, ""), root)
    # The checker restarts with its copy of the last valid file, which does not say whose it is.
    unknown = LAST_GOOD in (os.path.basename(theirs), os.path.basename(ours))
    return "" if unknown or theirs == ours else folder


def _settings_file(name: str, root: Path) -> str:
    return os.path.realpath(str(root / (name or ".env")))


def module_of(part: str) -> str:
    """The module that a part's process runs."""
    return "deploy.engine" if part == "engine" else f"{part}.server"


def log_of(pid: int) -> str:
    """The file of its standard output, with ` (deleted)` at the end if it was deleted; empty if it is not readable."""
    return _link(pid, "fd/1")


def _is_ours(pid: int, part: str, root: Path) -> bool:
    folder = PROC / str(pid)
    try:
        if part == "front":
            if not _front_folder(pid):
                return False
        elif f"\0-m\0{module_of(part)}\0".encode() not in (folder / "cmdline").read_bytes():
            return False
        if os.stat(folder).st_uid != os.geteuid() or _link(pid, "ns/pid") != _link(os.getpid(), "ns/pid"):
            return False
        return bool(processes.works_in(pid, root))
    except OSError:
        return False


def _front_folder(pid: int) -> str:
    """The log folder of the nginx that start.sh started; empty for any other process. Workers have another title."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "surrogateescape")
    except OSError:
        return ""
    found = FRONT_COMMAND.match(words)
    return found[1] if found else ""


def _describe(stat: processes.ProcessStat, expected_port: int | None, root: Path) -> FoundProcess:
    front = _front_folder(stat.pid)
    mark = {"log_dir": front} if front else mark_of(stat.pid)
    port, offset = mark.get("port"), mark.get("log_offset")
    if not isinstance(port, int):
        listened = ports.listened_by(stat.pid)
        port = expected_port if expected_port in listened or not listened else min(listened)
    record = ProcessRecord(
        stat.pid, stat.start_time, port or 0, processes.boot_id(), str(root),
        offset if isinstance(offset, int) else 0, str(mark.get("code", "")), processes.id_of(root),
    )  # fmt: skip
    log = log_of(stat.pid)
    return FoundProcess(record, log[: -len(DELETED)] if log.endswith(DELETED) else log, mark)


def _belongs(process: FoundProcess, part: str, log_dir: Path | None, port: int | None) -> bool:
    """Whether it serves this port or writes to this log folder; two services may run in one folder."""
    if log_dir is None and port is None:  # a server that someone runs by hand has neither
        return "log_dir" in process.mark or os.path.basename(process.log) == f"{part}.log"
    if "log_dir" in process.mark:
        same_folder = log_dir is not None and os.path.realpath(process.mark["log_dir"]) == os.path.realpath(log_dir)
        return same_folder or (port is not None and process.record.port == port)
    writes_there = log_dir is not None and process.log == os.path.join(os.path.realpath(log_dir), f"{part}.log")
    return writes_there or (port is not None and port in ports.listened_by(process.record.pid))


def _write_anew(log_dir: Path, part: str, record: ProcessRecord) -> None:
    with contextlib.suppress(OSError):
        log_dir.mkdir(parents=True, exist_ok=True)
        processes.write_record(log_dir, part, record)
        if not processes.is_running(record):  # stopped meanwhile: a record would look like a crash
            processes.record_path(log_dir, part).unlink()


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(PROC / str(pid) / name)
    except OSError:
        return ""
