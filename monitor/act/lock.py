"""One run at a time. A run that exceeds its deadline is killed by the next one, if it is certain which process that is.

The lock is flock(2) on a descriptor that no child inherits; a server started under the lock would otherwise hold it for
its lifetime. The holder records its identity and deadline in the file. Anybody may have written that, so a process is ended
only if it is a checker of this folder and the kernel says that it holds the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from monitor.observe import processes
from monitor.observe.small_file import open_file

FILE_NAME = "health_check.lock"
SCRIPT = "health_check.py"
END_WAIT_S = 3.0
RECORD_LIMIT_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """The process that holds the lock. `until` is its deadline (CLOCK_MONOTONIC), `what` its current activity."""

    pid: int
    start_time: int
    until: float
    what: str

    def alive(self) -> bool:
        stat = processes.read_stat(self.pid)
        return stat is not None and stat.running and stat.start_time == self.start_time


class Lock:
    """The lock of one run."""

    def __init__(self, log_dir: Path) -> None:
        self._path = log_dir / FILE_NAME
        self._file: FileIO | None = None
        self._until = 0.0

    def acquire(self, limit_s: float, what: str) -> str:
        """Empty if this process holds the lock now; otherwise who does. Kills a holder past its deadline."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _remove_what_is_no_file(self._path)
            # Unbuffered, so that on a full disk only the record fails, not the lock or its release.
            file = FileIO(open_file(self._path, os.O_RDWR | os.O_CREAT), "r+")
        except OSError:
            return ""  # the folder is unusable: a run without a lock is better than no run
        if not _try_flock(file):
            holder = _read_holder(file)
            if holder is None or holder.until > time.monotonic() or not holder.alive():
                if not _try_flock(file):
                    file.close()
                    return _describe(holder)
            else:
                problem = _end(holder, file)
                if problem:
                    file.close()
                    return problem
        self._file = file
        self.extend(limit_s, what)
        return ""

    def extend(self, limit_s: float, what: str) -> None:
        """Sets a new deadline, before something that takes longer, such as a restart."""
        self._until = time.monotonic() + limit_s
        if self._file is None:
            return
        stat = processes.read_stat(os.getpid())
        record = {
            "pid": os.getpid(), "start_time": stat.start_time if stat else 0, "until": self._until,
            "what": what,
        }  # fmt: skip
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the record
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(record).encode())

    def begin(self, limit_s: float) -> None:
        """Sets the deadline before the lock is held."""
        self._until = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.monotonic()

    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._until

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _remove_what_is_no_file(path: Path) -> None:
    """A pipe, a device or a link that leads to no file, none of which holds anything. Raises OSError."""
    if os.path.lexists(path) and not path.is_file() and not path.is_dir():
        path.unlink()


def _try_flock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait_for_flock(file: FileIO) -> bool:
    deadline = time.monotonic() + END_WAIT_S
    while not _try_flock(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _read_holder(file: FileIO) -> Holder | None:
    try:
        file.seek(0)
        raw = json.loads(file.read(RECORD_LIMIT_BYTES))
        return Holder(int(raw["pid"]), int(raw["start_time"]), float(raw["until"]), str(raw["what"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _end(holder: Holder, file: FileIO) -> str:
    """Ends a run past its deadline and takes the lock. Empty if that succeeded; otherwise why not."""
    if not _holds(holder.pid, file) or not _is_checker(holder.pid):
        if _try_flock(file):  # released meanwhile
            return ""
        shown = f"pid {holder.pid} ({processes.command_of(holder.pid)})"
        return f"the lock is held, and {shown}, which its file names, is not known to be a run of this checker: it is left alone"
    _terminate(holder, file)
    if _wait_for_flock(file):
        return ""
    if holder.alive():
        return f"{_describe(holder)}, which is past its deadline and cannot be killed"
    return f"the run of pid {holder.pid} was past its deadline and has been killed, but another process holds the lock now"


def _is_checker(pid: int) -> bool:
    """Whether it runs the checker in this folder."""
    try:
        words = (processes.PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    runs_script = any(os.path.basename(word) == SCRIPT.encode() for word in words[:4])
    return runs_script and processes.works_in(pid, processes.ROOT) is True


def _holds(pid: int, file: FileIO) -> bool:
    """Whether the kernel counts the lock of this file as held by a descriptor of the process."""
    try:
        own = os.fstat(file.fileno())
        for entry in (processes.PROC / str(pid) / "fdinfo").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                opened = os.stat(processes.PROC / str(pid) / "fd" / entry.name)
                if os.path.samestat(opened, own) and re.search(r"^lock:.*\bFLOCK\b", entry.read_text(encoding="ascii"), re.MULTILINE):
                    return True
    except (OSError, ValueError):
        return False
    return False


def _terminate(holder: Holder, file: FileIO) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not holder.alive() or not _holds(holder.pid, file):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(holder.pid, number)
        deadline = time.monotonic() + END_WAIT_S / 2
        while holder.alive() and time.monotonic() < deadline:
            time.sleep(0.05)


def _describe(holder: Holder | None) -> str:
    if holder is None:
        return "another run is in progress"
    left_s = holder.until - time.monotonic()
    return f"another run is in progress (pid {holder.pid}, {holder.what}, {max(0, left_s):.0f} s left)"
