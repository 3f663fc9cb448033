"""Which processes listen on a TCP port, from /proc/net/tcp.

Standard library only, and no syntax newer than Python 3.8, because stop.sh uses it without the environment. psutil's
`net_connections` is no substitute: it does not report the user of a socket whose process is not visible.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from monitor.observe.processes import PROC, command_of, user_name

LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    """A listening process. `pid` is None if it belongs to another user and is not visible."""

    pid: int | None
    uid: int

    def describe(self) -> str:
        if self.pid is None:
            return f"a process of user {user_name(self.uid)} (not visible from here)"
        return f"pid {self.pid} ({command_of(self.pid) or 'command not readable'})"


def listeners(port: int) -> list[Listener]:
    """Every process that listens on the port, on any address."""
    inodes = _listening_inodes(port)
    owners = _socket_owners(set(inodes))
    found = {Listener(owners.get(inode), uid) for inode, uid in inodes.items()}
    return sorted(found, key=lambda listener: listener.pid or 0)


def listened_by(pid: int) -> set[int]:
    """The ports on which the process listens."""
    held = set(_links_in(PROC / str(pid) / "fd"))
    return {port for port, inode, _ in _listening() if f"socket:[{inode}]" in held}


def why_taken(host: str, port: int, freed: bool = False) -> str:
    """Empty if a server can listen there; otherwise who holds the port, or why bind fails.

    `freed`: whoever holds the port gives it up first, so that only the address is judged.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, 0 if freed else port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return f"cannot listen on {host}:{port}: {error.strerror or error}"
        holders = ", ".join(listener.describe() for listener in listeners(port))
        return f"port {port} is held by {holders or 'a process that is not visible from here'}"
    return ""


def _listening_inodes(port: int) -> dict[str, int]:
    return {inode: uid for number, inode, uid in _listening() if number == port}


def _listening() -> list[tuple[int, str, int]]:
    """(port, inode, uid) of every listening socket."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN:
                found.append((int(fields[1].rpartition(":")[2], 16), fields[9], int(fields[7])))
    return found


def _socket_owners(inodes: set[str]) -> dict[str, int]:
    names = {f"socket:[{inode}]": inode for inode in inodes}
    owners: dict[str, int] = {}
    for entry in os.listdir(PROC) if names else ():
        if not entry.isdigit():
            continue
        folder = PROC / entry / "fd"
        for link in _links_in(folder):
            if link in names:
                owners.setdefault(names[link], int(entry))
    return owners


def _links_in(folder: Path) -> list[str]:
    links = []
    try:
        for name in os.listdir(folder):
            try:
                links.append(os.readlink(folder / name))
            except OSError:
                continue
    except OSError:
        pass
    return links
