"""The log of a server: one line per event (time, level, then key=value), on standard output, which start.sh appends to a file.

The API and the page use it. It imports no other part of the bundle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import sys
from datetime import UTC, datetime

STDOUT, STDERR = 1, 2


class LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = record.getMessage()
        if not message.startswith("event="):  # logged by a library
            message = f"event=log logger={record.name} message={json.dumps(message, ensure_ascii=False)}"
        line = f"{stamp} level={record.levelname.lower()} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class RotatedOutput(logging.StreamHandler):
    """Writes to standard output. If that is a file which has been renamed or deleted, to a new file of the same name.

    A log is rotated by renaming alone: each line is in the old file or in the new one. Copying and truncating loses the
    lines that are written in between. Standard error moves along if it is the same file.
    """

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(LineFormatter())
        self._path = ""
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(STDOUT).st_mode):
                self._path = os.readlink(f"/proc/self/fd/{STDOUT}")

    def emit(self, record: logging.LogRecord) -> None:
        if self._path:
            with contextlib.suppress(OSError, ValueError):  # a full disk, no folder, a closed stream: the old file goes on
                self._follow_rotation()
        super().emit(record)

    def _follow_rotation(self) -> None:
        current = os.fstat(STDOUT)
        with contextlib.suppress(FileNotFoundError):
            named = os.stat(self._path)
            if os.path.samestat(named, current) or not stat.S_ISREG(named.st_mode):
                return
        shares = os.path.samestat(os.fstat(STDERR), current)
        fresh = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            self.flush()
            os.dup2(fresh, STDOUT)
            if shares:
                os.dup2(fresh, STDERR)
        finally:
            os.close(fresh)


def set_up(level: str = "info") -> None:
    """Configures the root logger of the process, once, before the server starts."""
    logging.basicConfig(level=level.upper(), handlers=[RotatedOutput()], force=True)
    logging.captureWarnings(True)
