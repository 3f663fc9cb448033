"""Refusals are sent before the body arrives, and one key's slow bodies do not block others. Real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import httpx
import pytest
from served import KEY, chat_body
from server_process import WAIT_S, Server

SOON_S = 5.0  # generous for slow machines
OTHER = "sk-other-0123456789"
PROBE = "probe-token-0123456789"


def head(key: str | None = KEY, length: int = 5_000_000, path: str = "/v1/chat/completions", *extra: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *extra]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def answer_to(wire: socket.socket) -> bytes:
    """The whole answer: head, and as much as it announces."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += (piece := wire.recv(65536))
        assert piece, data
    top, _, body = data.partition(b"\r\n\r\n")
    [length] = [int(line[15:]) for line in top.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < length:
        body += wire.recv(65536)
    return top + b"\r\n\r\n" + body


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)


def ask(server: Server, key: str, content: str = "hi", **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=chat_body(content), timeout=WAIT_S,
                      headers={"Authorization": f"Bearer {key}", **headers})  # fmt: skip


def test_a_refused_client_need_not_send_its_body(start) -> None:
    server = start(GLM_KEY_REQUESTS_PER_MINUTE="1", GLM_MAX_BODY_BYTES="10000000", GLM_API_KEYS=f"other:{OTHER}")
    assert ask(server, KEY).status_code == 200
    refusals = [
        (head(), 429, b"rate_limit_exceeded"),
        (head(KEY, 5_000_000, "/v1/chat/completions", "Expect: 100-continue"), 429, b"rate_limit_exceeded"),
        (head(KEY, 5_000_000, "/v1/responses"), 429, b"rate_limit_exceeded"),
        (head(KEY, 5_000_000, "/tokenize"), 429, b"rate_limit_exceeded"),
        (head(None), 401, b"invalid_api_key"),
        (head("wrong"), 401, b"invalid_api_key"),
        (head(OTHER, 10_000_001), 413, b"body_too_large"),
        (head(OTHER, 5_000_000, "/v1/nothing"), 404, b"unknown_url"),
    ]
    for sent, status, code in refusals:
        with connected(server) as wire:
            began = time.monotonic()
            wire.sendall(sent)
            answer = answer_to(wire)

        assert answer.startswith(b"HTTP/1.1 %d " % status) and code in answer, (sent, answer)
        assert b"connection: close" in answer.lower() and b"x-request-id" in answer
        assert time.monotonic() - began < SOON_S
    assert ask(server, OTHER).status_code == 200


def test_a_refused_client_that_keeps_sending_is_not_reset(start) -> None:
    server = start(GLM_KEY_REQUESTS_PER_MINUTE="1")
    ask(server, KEY)
    with connected(server) as wire:
        wire.sendall(head(length=3_000_000))
        assert b" 429 " in answer_to(wire)
        for _ in range(3):
            wire.sendall(b"x" * 1_000_000)

        assert wire.recv(100) == b""  # closed, not reset


def test_a_refused_client_that_stalls_is_disconnected(start) -> None:
    server = start()
    with connected(server) as wire:
        wire.sendall(head("wrong") + b"x")
        assert b" 401 " in answer_to(wire)
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert wire.recv(100) == b""

    assert time.monotonic() - began < 30


def test_a_small_refused_request_is_answered_in_the_usual_format(start) -> None:
    server = start(GLM_KEY_REQUESTS_PER_MINUTE="1")
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=WAIT_S) as client:
        statuses = [client.post("/v1/chat/completions", json=chat_body()).status_code for _ in range(3)]
        models = [client.get("/v1/models") for _ in range(2)]

    assert statuses == [200, 429, 429]
    assert [answer.status_code for answer in models] == [200, 200]
    assert "connection" not in models[0].headers  # there was no body to discard, so the connection stays open


@pytest.mark.parametrize("share", [1, 3])
def test_unfinished_bodies_of_one_key_block_neither_others_nor_probes(share: int, start) -> None:
    """`share`: how many pairs of bodies use up the share of one key."""
    largest = 300_000
    server = start(GLM_MAX_BODY_BYTES=str(largest), GLM_API_KEYS=f"other:{OTHER}", GLM_PROBE_TOKEN=PROBE)
    with contextlib.ExitStack() as stack:
        remaining = 2 * largest  # one key's share of the arriving bytes
        for _ in range(2 * share):
            wire = stack.enter_context(connected(server))
            size = 2 * largest // (2 * share) - 1
            wire.sendall(head(length=largest) + b" " * size)
            remaining -= size
        wait_for_bytes(server, 2 * largest - remaining)

        own = ask(server, KEY, "x" * 1000)
        other = ask(server, OTHER, "x" * 1000)
        probe = ask(server, PROBE, "x" * 1000)

    assert (own.status_code, own.json()["error"]["code"]) == (429, "arriving_limit_exceeded"), own.text
    assert int(own.headers["retry-after"]) > 0 and f"<= {2 * largest} bytes" in own.json()["error"]["message"]
    assert (other.status_code, probe.status_code) == (200, 200)
    wait_for_bytes(server, 0)
    assert ask(server, KEY, "x" * 1000).status_code == 200


def wait_for_bytes(server: Server, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while arriving(server) != count:
        assert time.monotonic() < deadline, (arriving(server), count)
        time.sleep(0.02)


def arriving(server: Server) -> int:
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {OTHER}"}, timeout=WAIT_S).text
    [value] = [line.split()[1] for line in text.splitlines() if line.startswith("glm_body_bytes_arriving ")]
    return int(float(value))


def test_only_received_bytes_count(start) -> None:
    """A hundred clients that announce large bodies and send little do not block others."""
    server = start(GLM_MAX_BODY_BYTES="100000", GLM_API_KEYS=f"other:{OTHER}")
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connected(server)).sendall(head(length=100_000) + b"{")
        wait_for_bytes(server, 100)

        assert ask(server, KEY, json.dumps(["x" * 1000])).status_code == 200
