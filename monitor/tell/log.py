"""Log lines about the checker itself, on standard error, which cron appends to logs/health_check.log."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from typing import TextIO


def warn(text: str) -> None:
    """Never raises: that nobody can be told changes nothing else."""
    write_line(sys.stderr, f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}")


def write_line(stream: TextIO | None, text: str) -> OSError | None:
    """Why it could not be written, such as a full disk or a closed pipe; nothing more is written to that stream then."""
    if stream is None or stream.closed:
        return None
    try:
        print(text.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8"), file=stream, flush=True)
    except OSError as error:
        # What its buffer still holds would fail again at exit, and change the exit code.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return error
    return None
