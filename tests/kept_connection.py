"""How the server's end of a kept connection is set, and how long a request on it takes next to one on a new connection."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import requests

_PIDFD_OPEN, _PIDFD_GETFD = 434, 438  # system calls, on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def has_no_delay(pid: int, port: int) -> bool:
    """Whether the process sends at once (TCP_NODELAY) on the connection that is opened here. Needs the right to trace it.

    Raises OSError without that right.
    """
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")  # not to its end, so that the connection stays
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                if peer := _peer(pid, int(descriptor.name)):
                    try:
                        if peer.getpeername() == client.getsockname():
                            return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
                    except OSError:
                        continue
                    finally:
                        peer.close()
            time.sleep(0.05)
    raise AssertionError("the server has not accepted the connection")


def _peer(pid: int, descriptor: int) -> socket.socket | None:
    """A copy of another process's socket; None if the descriptor is something else."""
    try:
        if not os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("socket:"):
            return None
    except FileNotFoundError:
        return None
    process = _checked(_libc.syscall(_PIDFD_OPEN, pid, 0))
    try:
        return socket.socket(fileno=_checked(_libc.syscall(_PIDFD_GETFD, process, descriptor, 0)))
    finally:
        os.close(process)


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def slowdown_of_kept(url: str, rounds: int = 15, attempts: int = 3) -> float:
    """Median time of a GET on a kept connection over that on a new one; the best of several attempts on a busy machine."""
    return min(_slowdown(url, rounds) for _ in range(attempts))


def _slowdown(url: str, rounds: int) -> float:
    with requests.Session() as session:
        session.get(url, timeout=30)
        kept = [_seconds(session.get, url) for _ in range(rounds)]
    return median(kept) / median(_seconds(requests.get, url) for _ in range(rounds))


def _seconds(get: Callable[..., requests.Response], url: str) -> float:
    began = time.monotonic()
    get(url, timeout=30).raise_for_status()
    return time.monotonic() - began
