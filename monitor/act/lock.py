"""One run at a time. A run that exceeds its deadline is killed by the next one.

The lock is flock(2) on a descriptor that no child inherits; a server started under the lock would otherwise hold it for
its lifetime. The holder records its identity and deadline in the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from monitor.observe import processes
from monitor.observe.small_file import open_file

FILE_NAME = "health_check.lock"
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
                _terminate(holder)
                if not _wait_for_flock(file):
                    file.close()
                    return f"{_describe(holder)}, which is past its deadline and cannot be killed"
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


def _terminate(holder: Holder) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not holder.alive():
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
