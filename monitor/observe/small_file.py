"""Reads a file that should be small, whatever is in its place. Standard library only, and no syntax newer than Python 3.8."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_BYTES = 2**20


def read_small(path: Path, limit_bytes: int = LIMIT_BYTES) -> str:
    """The text, with what is not UTF-8 replaced. Raises OSError, also for a larger file, a pipe or a device."""
    # Opening a pipe blocks until somebody writes to it.
    with open(os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a file")
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(f"{path} has more than {limit_bytes} bytes")
    return data.decode("utf-8", "replace")
