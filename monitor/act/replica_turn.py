"""One replica is restarted at a time, until it answers again: the others serve meanwhile.

The turn is flock(2) on a file in the folder of all replicas, which no child inherits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from monitor.observe.http_exchange import exchange
from settings import Settings

FILE_NAME = "restart.lock"
POLL_S = 0.2
READY_LIMIT_S = 2.0


@contextlib.contextmanager
def taking_turns(settings: Settings, wait_s: float) -> Iterator[str]:
    """`settings`: of the replica. Yields empty once it is its turn; otherwise, after `wait_s`, whose it is.

    The turn ends when the replica is ready, or `start_deadline_s` after the restart.
    """
    path = settings.log_dir.parent / FILE_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield ""  # the folder is unusable: a restart without the turn is better than none
        return
    try:
        deadline = time.monotonic() + wait_s
        while not _taken(descriptor):
            if time.monotonic() >= deadline:
                yield "another replica is being restarted; this one is next"
                return
            time.sleep(POLL_S)
        yield ""
        _wait_until_ready(settings)
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait_until_ready(settings: Settings) -> None:
    deadline = time.monotonic() + settings.start_deadline_s
    while exchange(f"{settings.api_base_url}/readyz", READY_LIMIT_S).status == 503 and time.monotonic() < deadline:
        time.sleep(POLL_S)
