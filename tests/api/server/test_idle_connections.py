"""Connections that never send a request, from a client without a key: they must not keep others out."""

from __future__ import annotations

import contextlib
import resource
import socket

import psutil
import pytest
from served import chat_body, wait_for
from server_process import Server

from api.http.connection import MOST_WAITING


def crowd(stack: contextlib.ExitStack, server: Server, count: int) -> None:
    for _ in range(count):
        stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))


@pytest.mark.parametrize(("spare", "rounds"), [(40, 3), (4, 1)])
def test_idle_connections_leave_room_for_others_when_descriptors_are_few(start, spare: int, rounds: int) -> None:
    server: Server = start()
    process = psutil.Process(server.process.pid)
    limit = process.num_fds() + spare
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))

    with contextlib.ExitStack() as stack:
        for _ in range(rounds):
            crowd(stack, server, 60)
            server.until(lambda health: health["state"] == "idle", limit_s=6)
            assert server.post(chat_body("hi"), timeout=6).status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_no_more_connections_wait_than_allowed_though_descriptors_are_many(start) -> None:
    server: Server = start()
    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    assert soft in (65_536, hard) or soft > 65_536, "the soft limit was raised"
    process = psutil.Process(server.process.pid)
    before = process.num_fds()
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, ours[1]), ours[1]))
    try:
        with contextlib.ExitStack() as stack:
            crowd(stack, server, 5000)
            wait_for(lambda: process.num_fds() - before <= MOST_WAITING + 1, limit_s=3)
            server.until(lambda health: health["state"] == "idle", limit_s=6)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)
