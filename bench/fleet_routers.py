"""How a router chooses a replica for a request: at random, by least connections, or by a hash of the chat as nginx does."""

from __future__ import annotations

import random
import zlib
from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Protocol

POINTS = 160  # of each server on nginx's ring


class Router(Protocol):
    def choose(self, chat: str, tried: Collection[int]) -> int | None:
        """The replica for a request of this chat, other than those that have refused it. None: there is no other."""

    def began(self, replica: int) -> None: ...

    def ended(self, replica: int) -> None: ...


class Random:
    def __init__(self, replicas: int, rng: random.Random) -> None:
        self._replicas, self._rng = replicas, rng

    def choose(self, chat: str, tried: Collection[int]) -> int | None:
        if not tried:
            return self._rng.randrange(self._replicas)
        others = [replica for replica in range(self._replicas) if replica not in tried]
        return self._rng.choice(others) if others else None

    def began(self, replica: int) -> None: ...

    def ended(self, replica: int) -> None: ...


class LeastConnections:
    """The replica with the fewest requests, any of those if there are several. Keeps them by their number of requests."""

    def __init__(self, replicas: int, rng: random.Random) -> None:
        self._rng = rng
        self._load = [0] * replicas
        self._with: list[list[int]] = [list(range(replicas))]
        self._place = list(range(replicas))  # of each in its list

    def choose(self, chat: str, tried: Collection[int]) -> int | None:
        for replicas in self._with:
            found = [replica for replica in replicas if replica not in tried] if tried else replicas
            if found:
                return found[self._rng.randrange(len(found))]
        return None

    def began(self, replica: int) -> None:
        self._move(replica, 1)

    def ended(self, replica: int) -> None:
        self._move(replica, -1)

    def _move(self, replica: int, step: int) -> None:
        left = self._with[self._load[replica]]
        last = left.pop()
        if last != replica:
            left[self._place[replica]] = last
            self._place[last] = self._place[replica]
        self._load[replica] += step
        while len(self._with) <= self._load[replica]:
            self._with.append([])
        entered = self._with[self._load[replica]]
        self._place[replica] = len(entered)
        entered.append(replica)


class Hash:
    """nginx's `hash ... consistent`: the same points of the same servers, and the next server on the ring after a refusal."""

    def __init__(self, servers: Sequence[str]) -> None:
        """`servers` as host:port, as the upstream block has them."""
        points = sorted({point: number for number, server in enumerate(servers) for point in _points(server)}.items())
        self._hashes = [point for point, _ in points]
        self._servers = [server for _, server in points]
        self._replicas = len(servers)

    def choose(self, chat: str, tried: Collection[int]) -> int | None:
        if len(tried) >= self._replicas:
            return None
        at = bisect_left(self._hashes, zlib.crc32(chat.encode()))
        while (server := self._servers[at % len(self._servers)]) in tried:
            at += 1
        return server

    def began(self, replica: int) -> None: ...

    def ended(self, replica: int) -> None: ...


def _points(server: str) -> list[int]:
    host, _, port = server.rpartition(":")
    base = zlib.crc32(host.encode() + b"\0" + port.encode())
    points, last = [], 0
    for _ in range(POINTS):
        last = zlib.crc32(last.to_bytes(4, "little"), base)
        points.append(last)
    return points
