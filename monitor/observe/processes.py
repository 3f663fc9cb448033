"""The processes that start.sh started, identified by pid and start time from `logs/<part>.pid.json`.

`logs/<part>.stopped` says that a part was stopped on purpose. Without that mark a process that is gone has crashed, whatever
became of its pid file. `logs/<part>.restarting` says that a person's start.sh has ended it and starts it again.

Reads and writes the pid file, checks whether a process is still the recorded one, and ends exactly that process with its
descendants. Standard library only, and no syntax newer than Python 3.8, so that stop.sh works without the environment.
psutil is no substitute: its `create_time` is in wall-clock seconds, which move with the clock; the kernel's ticks do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import resource
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monitor.observe.small_file import open_file, read_small

ROOT = Path(__file__).resolve().parent.parent.parent
PROC = Path("/proc")
FAILED_START = "a failed start"
DELETED = " (deleted)"  # the kernel's suffix for what no longer has a name
BOOT_ID = PROC / "sys/kernel/random/boot_id"


@dataclass(frozen=True)
class ProcessRecord:
    """The pid file. `start_time` is in clock ticks since the boot `boot_id`.

    `code` identifies the source files that the process was started from (deploy/identity.py); empty if unknown.
    `folder` is the project's folder, and `folder_id` that folder whatever its name (`id_of`).
    """

    pid: int
    start_time: int
    port: int
    boot_id: str = ""
    folder: str = ""
    log_offset: int = 0
    code: str = ""
    folder_id: str = ""


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


def open_files(pid: int) -> tuple[int | None, int | None]:
    """How many it has open, and how many it may have; None where unknown or without limit."""
    try:
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
        return len(os.listdir(PROC / str(pid) / "fd")), None if limit == resource.RLIM_INFINITY else limit
    except OSError:
        return None, None


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


def stop_mark(log_dir: Path, part: str) -> Path:
    return log_dir / f"{part}.stopped"


def mark_stopped(log_dir: Path, part: str, why: str) -> bool:
    """Before the process is ended, so that no run of the checker sees the end without the reason. False if marked already.

    Raises OSError. On a full disk the mark may be empty, which is as good.
    """
    try:
        descriptor = os.open(stop_mark(log_dir, part), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{why}\n".encode())
    os.close(descriptor)
    return True


def unmark_stopped(log_dir: Path, part: str) -> None:
    with contextlib.suppress(OSError):
        stop_mark(log_dir, part).unlink()


def was_stopped(log_dir: Path, part: str) -> bool:
    """Whether it was stopped on purpose, or a start of it failed and was undone."""
    return stop_mark(log_dir, part).exists()


def was_stopped_by_request(log_dir: Path, part: str) -> bool:
    try:
        return read_small(stop_mark(log_dir, part)).strip() != FAILED_START
    except (OSError, ValueError):
        return was_stopped(log_dir, part)


def restart_mark(log_dir: Path, part: str) -> Path:
    return log_dir / f"{part}.restarting"


def begin_restart(log_dir: Path, part: str, pid: int, limit_s: float) -> None:
    """Notes before a stop that the start.sh of this pid starts the part again, within this time. Raises OSError."""
    stat = read_stat(pid)
    noted = {
        "pid": pid, "start_time": stat.start_time if stat else 0, "boot_id": boot_id(),
        "until": time.clock_gettime(time.CLOCK_BOOTTIME) + limit_s,
    }  # fmt: skip
    with os.fdopen(open_file(restart_mark(log_dir, part), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
        json.dump(noted, file)


def end_restart(log_dir: Path, part: str) -> None:
    with contextlib.suppress(OSError):
        restart_mark(log_dir, part).unlink()


def is_restarting(log_dir: Path, part: str) -> bool:
    """Whether a person's start.sh is between its stop and its start. It counts no longer once that start.sh has ended, or is overdue."""
    try:
        noted = json.loads(read_small(restart_mark(log_dir, part)))
        stat = read_stat(int(noted["pid"]))
        same = stat is not None and stat.running and stat.start_time == noted["start_time"] and noted["boot_id"] == boot_id()
        return same and time.clock_gettime(time.CLOCK_BOOTTIME) < float(noted["until"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False


def note_failed_start(log_dir: Path, part: str, why: str) -> None:
    """Keeps the reason for the checker, which finds no process then; empty removes the last one."""
    path = log_dir / f"{part}.failed"
    with contextlib.suppress(OSError):
        if not why:
            path.unlink()
            return
        descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{why[:1000]}\n")


def failed_start(log_dir: Path, part: str) -> str:
    """Why the last start failed; empty if it did not."""
    try:
        return read_small(log_dir / f"{part}.failed").strip()
    except (OSError, ValueError):
        return ""


def forget(log_dir: Path, part: str) -> None:
    """Removes the pid file of what was stopped. Raises OSError."""
    if was_stopped(log_dir, part):
        with contextlib.suppress(FileNotFoundError):
            record_path(log_dir, part).unlink()
        return
    with contextlib.suppress(FileNotFoundError):
        os.replace(record_path(log_dir, part), stop_mark(log_dir, part))  # possible on a disk without room for a mark


def read_record(log_dir: Path, part: str, root: Path | None = None) -> ProcessRecord | None:
    """None if there is no pid file, it cannot be parsed, or it is of another folder. process_search.py finds the process then.

    `root`: the project's folder, by default that of this code.
    """
    try:
        return parse_record(json.loads(read_small(record_path(log_dir, part))), root)
    except (OSError, ValueError, RecursionError):
        return None


def parse_record(raw: Any, root: Path | None = None) -> ProcessRecord | None:
    """None if it is no record, or one of another folder."""
    try:
        record = ProcessRecord(
            pid=int(raw["pid"]),
            start_time=int(raw["start_time"]),
            port=int(raw["port"]),
            boot_id=str(raw.get("boot_id", "")),
            folder=str(raw.get("folder", "")),
            log_offset=int(raw.get("log_offset", 0)),
            code=str(raw.get("code", "")),
            folder_id=str(raw.get("folder_id", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return record if _is_of_folder(record, root or ROOT) else None


def _is_of_folder(record: ProcessRecord, root: Path) -> bool:
    """A copy of the project has the pid files of the original, whose processes are none of the copy's.

    The working directory of a process follows a folder that is moved. If it has ended, the path decides, and after a move
    the identity of the folder.
    """
    if not record.folder:
        return True
    if is_running(record):
        works_here = works_in(record.pid, root)
        if works_here is not None:
            return works_here
    if os.path.realpath(record.folder) == os.path.realpath(str(root)):
        return True
    return bool(record.folder_id) and record.boot_id == boot_id() and record.folder_id == id_of(root)


def id_of(folder: Path) -> str:
    """Device and inode, which a move within the file system keeps and a copy does not; empty if it cannot be read."""
    try:
        found = os.stat(folder)
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}"


def works_in(pid: int, folder: Path) -> bool | None:
    """Whether its working directory is this folder, also under an earlier name; None if that is not readable."""
    cwd = PROC / str(pid) / "cwd"
    try:
        # A folder that was moved keeps its inode, one that was deleted and cloned again keeps its path.
        return os.readlink(cwd) == f"{os.path.realpath(str(folder))}{DELETED}" or os.path.samefile(cwd, folder)
    except OSError:
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
        if stat.start_time >= record.start_time and (leader_runs or _works_in(stat.pid, record.folder) or works_in(stat.pid, ROOT)):
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


def end(record: ProcessRecord, grace_s: float, kill_wait_s: float = 10.0, first: int = signal.SIGTERM) -> list[int]:
    """The `first` signal, then SIGKILL after `grace_s`. Returns the pids that survive, which are in uninterruptible sleep."""
    _signal(record, first)
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
