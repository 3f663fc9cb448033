"""The real server as a router sees it: at a start, and at a stop with a delay."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import pytest
from ports import free_port
from served import chat_body, sse_data, wait_for
from server_process import HEADERS, WAIT_S, Server

DELAY_S = 4.0
PROBED = ("/livez", "/readyz", "/health", "/ping", "/v1/models")


def statuses(server: Server) -> dict[str, int]:
    return {path: httpx.get(server.url + path, headers=HEADERS, timeout=WAIT_S).status_code for path in PROBED}


@pytest.fixture
def demo(tmp_path: Path):
    with contextlib.ExitStack() as stack:

        def started(fault: str = "", **environment: str) -> Server:
            if fault:
                (tmp_path / "api.fault").write_text(json.dumps({"fault": fault, "seconds": 60}))
            server = Server(
                free_port(), tmp_path / "api.log", [sys.executable, "-m", "api.server"], GLM_LOG_DIR=str(tmp_path),
                GLM_MODEL="models/shapes", GLM_DEVICE="cpu", OMP_NUM_THREADS="1", **environment,
            )  # fmt: skip
            stack.callback(server.process.wait, WAIT_S)
            stack.callback(server.process.kill)
            return server

        yield started


def test_work_is_taken_for_the_delay_while_routers_see_that_it_leaves(demo) -> None:
    server = demo(GLM_DRAIN_DELAY_S=str(DELAY_S))
    server.until(lambda health: health["state"] == "idle")
    assert set(statuses(server).values()) == {200}

    server.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    wait_for(lambda: statuses(server)["/readyz"] == 503, limit_s=1)
    noticed_s = time.monotonic() - signalled
    leaving = statuses(server)
    state = server.health()["state"]
    answered = [server.post(chat_body("What can you do?", max_tokens=8)).status_code]
    while time.monotonic() < signalled + DELAY_S - 1:
        answered.append(server.post(chat_body("What can you do?", max_tokens=8)).status_code)

    assert noticed_s < 1 and state == "draining"
    assert leaving == {"/livez": 200, "/readyz": 503, "/health": 503, "/ping": 503, "/v1/models": 200}
    assert set(answered) == {200} and len(answered) > 1, "a question of the delay was refused"
    assert server.process.wait(WAIT_S) == 0
    assert DELAY_S - 0.1 < time.monotonic() - signalled < DELAY_S + 10
    assert f"event=drain signal=15 delay_s={DELAY_S:.3f} deadline_s=10.000" in server.log.read_text()


def test_after_the_delay_running_answers_end_and_new_ones_are_refused(start) -> None:
    server = start(GLM_DRAIN_DELAY_S="1", GLM_DRAIN_S="120", FAKE_TOKEN_S="0.05")
    with contextlib.ExitStack() as stack:
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda health: health["state"] == "draining")
        begun_in_the_delay = server.open_stream(stack, "x" * 100)
        lines = begun_in_the_delay.iter_lines()
        next(lines)
        time.sleep(1.2)
        refused, livez = server.post(chat_body("new")), httpx.get(f"{server.url}/livez", timeout=WAIT_S)
        events = sse_data("\n".join(lines))

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert int(refused.headers["Retry-After"]) > 0
    assert {answer.headers.get("Connection") for answer in (begun_in_the_delay, refused, livez)} == {"close"}
    assert (livez.status_code, livez.json()) == (200, {"state": "draining"})
    assert events[-1] == "[DONE]"
    assert server.process.wait(WAIT_S) == 0


def test_a_server_that_still_loads_leaves_without_a_delay_and_lives(demo) -> None:
    server = demo("slow-start", GLM_DRAIN_DELAY_S="600", GLM_TEST_FAULTS="true")
    server.until(lambda health: health["state"] == "loading")

    assert statuses(server) == {"/livez": 200, "/readyz": 503, "/health": 503, "/ping": 503, "/v1/models": 503}

    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT_S) == 0


def test_a_kept_connection_is_closed_after_the_answer_that_the_delay_gives(start) -> None:
    server = start(GLM_DRAIN_DELAY_S="600")
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as kept:
        for leaving in (False, True):
            if leaving:
                server.process.send_signal(signal.SIGTERM)
                server.until(lambda health: health["state"] == "draining")
            kept.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += kept.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ") and (b"connection: close" in answer.lower()) == leaving

        assert kept.recv(1) == b""


def test_a_second_signal_ends_the_delay(demo) -> None:
    server = demo(GLM_DRAIN_DELAY_S="600")
    server.until(lambda health: health["state"] == "idle")
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda health: health["state"] == "draining")

    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(WAIT_S) == 0
