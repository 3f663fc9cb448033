"""Opens only what is a file: a pipe in its place would hold whoever opens it. Standard library only, and no syntax newer than Python 3.8."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_BYTES = 2**20


def read_small(path: Path, limit_bytes: int = LIMIT_BYTES) -> str:
    """The text, with what is not UTF-8 replaced. Raises OSError, also for a larger file, a pipe or a device."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(f"{path} has more than {limit_bytes} bytes")
    return data.decode("utf-8", "replace")


def open_file(path: Path, flags: int, mode: int = 0o644) -> int:
    """A descriptor. Raises OSError, also for a pipe or a device. Does not wait: opening a pipe would, for its other end."""
    descriptor = os.open(str(path), flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a file", str(path))


def is_no_file(path: Path) -> bool:
    """Whether something else than a file is there, such as a pipe or a folder."""
    return path.exists() and not path.is_file()
