"""The processes that start.sh started, identified by pid and start time from `logs/<part>.pid.json`.

Reads and writes the pid file, checks whether a process is still the recorded one, and ends exactly that process with its
descendants. Standard library only, and no syntax newer than Python 3.8, so that stop.sh works without the environment.
psutil is no substitute: its `create_time` is in wall-clock seconds, which move with the clock; the kernel's ticks do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from monitor.observe.small_file import read_small

PROC = Path("/proc")
BOOT_ID = PROC / "sys/kernel/random/boot_id"


@dataclass(frozen=True)
class ProcessRecord:
    """The pid file. `start_time` is in clock ticks since the boot `boot_id`.

    `code` identifies the source files that the process was started from (deploy/identity.py); empty if unknown.
    """

    pid: int
    start_time: int
    port: int
    boot_id: str = ""
    folder: str = ""
    log_offset: int = 0
    code: str = ""


@dataclass(frozen=True)
class ProcessStat:
    """The fields of /proc/PID/stat that identify a process (proc_pid_stat(5))."""

    pid: int
    state: str
    session: int
    start_time: int

    @property
    def running(self) -> bool:
        return self.state not in "ZX"


def read_stat(pid: int) -> ProcessStat | None:
    """None if there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the command name before it may hold spaces and brackets
    return ProcessStat(pid, fields[0], int(fields[3]), int(fields[19]))


def command_of(pid: int) -> str:
    """The command line; empty if it is not readable."""
    try:
        raw = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()[:160]


def user_of(pid: int) -> str:
    """The name of the user who runs it; empty if it is gone."""
    try:
        uid = os.stat(PROC / str(pid)).st_uid
    except OSError:
        return ""
    return user_name(uid)


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def boot_id() -> str:
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def record_path(log_dir: Path, part: str) -> Path:
    return log_dir / f"{part}.pid.json"


def write_record(log_dir: Path, part: str, record: ProcessRecord) -> None:
    """Replaces the pid file atomically. Raises OSError."""
    path = record_path(log_dir, part)
    descriptor, temporary = tempfile.mkstemp(dir=str(log_dir), prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            json.dump(asdict(record), file)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def read_record(log_dir: Path, part: str) -> ProcessRecord | None:
    """None if there is no pid file or it cannot be parsed. process_search.py finds the process in that case."""
    try:
        raw = json.loads(read_small(record_path(log_dir, part)))
        return ProcessRecord(
            pid=int(raw["pid"]),
            start_time=int(raw["start_time"]),
            port=int(raw["port"]),
            boot_id=str(raw.get("boot_id", "")),
            folder=str(raw.get("folder", "")),
            log_offset=int(raw.get("log_offset", 0)),
            code=str(raw.get("code", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_running(record: ProcessRecord) -> bool:
    """Whether the recorded process still runs; a reused pid does not count."""
    if record.boot_id and record.boot_id != boot_id():
        return False
    stat = read_stat(record.pid)
    return stat is not None and stat.running and stat.start_time == record.start_time


def members(record: ProcessRecord) -> list[int]:
    """Running processes of the recorded session, the leader first.

    The kernel does not reuse a pid while a session has that number, so after the leader has ended, processes of its
    session are its orphans. They must also still run in the project's folder.
    """
    if record.boot_id and record.boot_id != boot_id():
        return []
    leader = read_stat(record.pid)
    if leader is not None and leader.start_time != record.start_time:
        return []
    leader_runs = leader is not None and leader.running
    found = [record.pid] if leader_runs else []
    for stat in all_stats():
        if stat.pid == record.pid or stat.session != record.pid or not stat.running:
            continue
        if stat.start_time >= record.start_time and (leader_runs or _works_in(stat.pid, record.folder)):
            found.append(stat.pid)
    return found


def foreign_owner(record: ProcessRecord) -> str:
    """The user of the recorded processes if this user may not signal them, otherwise empty."""
    for pid in members(record):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        except PermissionError:
            return user_of(pid)
    return ""


def end(record: ProcessRecord, grace_s: float, kill_wait_s: float = 10.0) -> list[int]:
    """SIGTERM, then SIGKILL after `grace_s`. Returns the pids that survive, which are in uninterruptible sleep."""
    _signal(record, signal.SIGTERM)
    # A stopped process handles SIGTERM only once it is continued.
    _signal(record, signal.SIGCONT)
    if _wait_until_gone(record, grace_s):
        return []
    deadline = time.monotonic() + kill_wait_s
    while time.monotonic() < deadline:
        _signal(record, signal.SIGKILL)
        if _wait_until_gone(record, 0.5):
            return []
    return members(record)


def _signal(record: ProcessRecord, number: int) -> None:
    pids = members(record)
    if not pids:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(record.pid, number)
    for pid in pids:  # processes outside the leader's process group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(pid) != record.pid:
                os.kill(pid, number)


def _wait_until_gone(record: ProcessRecord, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while members(record):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def all_stats() -> list[ProcessStat]:
    """Every process that is visible from here."""
    stats = (read_stat(int(entry)) for entry in os.listdir(PROC) if entry.isdigit())
    return [stat for stat in stats if stat is not None]


def _works_in(pid: int, folder: str) -> bool:
    try:
        return bool(folder) and os.readlink(PROC / str(pid) / "cwd") == folder
    except OSError:
        return False


def age_s(record: ProcessRecord) -> float | None:
    """Seconds since the process started; None if unknown."""
    try:
        # Not /proc/uptime, which some containers rewrite.
        since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        return max(0.0, since_boot_s - record.start_time / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return None
