"""TCP ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, PER_WORKER = 15_000, 1_000  # below the range from which the kernel takes ports for outgoing connections

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_candidates = itertools.cycle(range(FIRST + _worker * PER_WORKER, FIRST + (_worker + 1) * PER_WORKER))


def free_port() -> int:
    """A port of the loopback interface on which nothing listens, and which no other worker is given."""
    for port in itertools.islice(_candidates, PER_WORKER):
        with socket.socket() as probe:
            # As servers bind, so that a connection that has just been closed does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no free port from {FIRST} to {FIRST + (_worker + 1) * PER_WORKER}")
