"""The server as a process of its own, with the fake model: real sockets, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from served import KEY, chat_body, sse_data
from server_process import HEADERS, ROOT, WAIT_S, Server

from api.server import DEVICE_LOST


def test_disconnecting_from_a_stream_stops_the_work_within_a_second(start) -> None:
    server = start(FAKE_TOKEN_S="0.05")  # the answer would take 50 s
    with contextlib.ExitStack() as stack:
        stream = server.open_stream(stack, "x" * 1000)
        next(stream.iter_lines())
    disconnected_at = time.monotonic()

    health = server.until(lambda health: health["running"] + health["waiting"] == 0)

    assert time.monotonic() - disconnected_at < 5  # a second, and a margin for slow machines
    assert health["state"] == "idle" and health["steps"] < 200
    server.until_logged("failure=client_gone")
    assert server.health()["outcomes"] == {"answered": {"text": 0, "picture": 0}, "failed": {}}, "its own choice"


def test_disconnecting_from_a_plain_request_stops_the_work_within_a_second(start) -> None:
    server = start(FAKE_TOKEN_S="0.05")

    with pytest.raises(httpx.ReadTimeout):
        server.post(chat_body("x" * 1000), timeout=1.0)
    disconnected_at = time.monotonic()
    server.until(lambda health: health["running"] + health["waiting"] == 0)

    assert time.monotonic() - disconnected_at < 5
    server.until_logged("status=499")
    metrics = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=WAIT_S).text
    assert 'glm_request_failure_total{reason="client_gone",traffic="user"} 1.0' in metrics


def test_disconnecting_while_queued_releases_the_permit(start) -> None:
    server = start(GLM_QUEUE_SIZE="1", FAKE_TOKEN_S="0.05")
    with contextlib.ExitStack() as running:
        server.open_stream(running, "x" * 1000)
        server.until(lambda health: health["running"] == 1)
        with contextlib.ExitStack() as waiting:
            server.open_stream(waiting, "y" * 1000)
            server.until(lambda health: health["waiting"] == 1)
            assert server.post(chat_body("z")).status_code == 503
        server.until(lambda health: health["waiting"] == 0)
        with contextlib.ExitStack() as next_one:
            assert server.open_stream(next_one, "z").status_code == 200


def test_sigterm_lets_a_running_answer_finish_and_then_exits_with_zero(start) -> None:
    server = start(FAKE_TOKEN_S="0.02")
    with contextlib.ExitStack() as stack:
        stream = server.open_stream(stack, "x" * 100)
        lines = stream.iter_lines()
        next(lines)

        server.process.send_signal(signal.SIGTERM)
        server.until(lambda health: health["state"] == "draining")
        refused = server.post(chat_body("new"))
        events = sse_data("\n".join(lines))

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "stop"
    assert server.process.wait(WAIT_S) == 0
    assert "event=drained finished=True" in server.log.read_text()


def test_sigterm_with_a_hung_engine_ends_the_answer_with_an_error_event_at_the_deadline(start) -> None:
    server = start(GLM_DRAIN_S="0.5")
    with contextlib.ExitStack() as stack:
        stream = server.open_stream(stack, "HANG")
        lines = stream.iter_lines()
        next(lines)

        server.process.send_signal(signal.SIGTERM)
        events = sse_data("\n".join(lines))

    assert events[-1]["error"]["code"] == "draining"
    assert server.process.wait(WAIT_S) == 0
    assert "event=drained finished=False" in server.log.read_text()


def test_a_second_signal_ends_the_process_at_once(start) -> None:
    server = start(GLM_DRAIN_S="600")
    with contextlib.ExitStack() as stack:
        server.open_stream(stack, "HANG")
        server.process.send_signal(signal.SIGINT)
        server.until(lambda health: health["state"] == "draining")
        server.process.send_signal(signal.SIGINT)

        assert server.process.wait(WAIT_S) == 0


def test_health_keeps_answering_while_the_engine_hangs(start) -> None:
    server = start()
    with contextlib.ExitStack() as stack:
        server.open_stream(stack, "HANG")
        before = server.until(lambda health: health["phase"] == "prefill")

        assert server.health()["steps"] == before["steps"] == 0
        assert server.health()["state"] == "busy"


def test_a_client_that_sends_too_much_still_receives_the_error(start) -> None:
    server = start(GLM_MAX_BODY_BYTES="100000")

    response = server.post(chat_body("x" * 5_000_000))

    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_client_refused_while_it_sends_still_receives_the_error(start) -> None:
    server = start(GLM_QUEUE_SIZE="1")
    with contextlib.ExitStack() as stack:
        for content, count in (("HANG", "running"), ("wait", "waiting")):
            server.open_stream(stack, content)
            server.until(lambda health, count=count: health[count] == 1)

        response = server.post(chat_body("x" * 5_000_000))

    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")


def test_a_port_in_use_is_reported_and_exits_with_one(start, tmp_path: Path) -> None:
    server = start()

    second = Server(server.port, tmp_path / "second.log")

    assert second.process.wait(WAIT_S) == 1
    log = second.log.read_text()
    assert "Address already in use" in log and f"event=cannot_listen host=127.0.0.1 port={server.port}" in log
    assert server.health()["state"] == "idle"


def test_health_is_not_logged(start) -> None:
    server = start()
    server.health()
    server.post(chat_body())

    assert "/health" not in server.until_logged("path=/v1/chat/completions")


def test_a_lost_device_exits_with_its_own_code_after_the_clients_received_the_error(start) -> None:
    server = start()

    refused = server.post(chat_body("CRASH"))

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dead")
    assert server.process.wait(WAIT_S) == DEVICE_LOST == 70
    assert "event=device_lost code=70" in server.log.read_text()


def test_a_lost_device_is_an_error_event_in_a_stream(start) -> None:
    server = start()
    with contextlib.ExitStack() as stack:
        events = sse_data("\n".join(server.open_stream(stack, "CRASH").iter_lines()))

    assert events[-1]["error"]["code"] == "dead"
    assert server.process.wait(WAIT_S) == 70


def test_an_idle_connection_is_closed_after_five_seconds(start) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        while idle.recv(65536):
            pass

    assert 3 < time.monotonic() - began < 30


def test_a_slow_request_head_times_out(start) -> None:
    server = start()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)) for _ in range(2)
        )
        second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # a complete request first, then slowly
        assert second.recv(65536).startswith(b"HTTP/1.1 200")
        dripping = [first, second]
        while dripping and time.monotonic() - began < 30:
            time.sleep(0.5)
            dripping = [each for each in dripping if _is_open(each, b"G")]

    assert dripping == []
    assert 9 < time.monotonic() - began < 20


def _is_open(connection: socket.socket, data: bytes) -> bool:
    """Whether the other end still has the connection open."""
    try:
        connection.sendall(data)
        connection.setblocking(False)
        return connection.recv(1000) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        connection.setblocking(True)


def test_a_connection_reset_stops_the_work(start) -> None:
    server = start(FAKE_TOKEN_S="0.05")
    body = json.dumps(chat_body("x" * 1000, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as rude:
        rude.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        rude.recv(1000)
        server.until(lambda health: health["running"] == 1)
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    health = server.until(lambda health: health["running"] == 0)
    assert health["steps"] < 200


def test_a_client_that_does_not_read_holds_no_slot(start) -> None:
    server = start(FAKE_ANSWER="x" * 3000)
    body = json.dumps(chat_body("go", stream=True, max_tokens=3000)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.until(lambda health: health["steps"] > 10)
        server.until(lambda health: health["running"] == 0)

        assert server.post(chat_body("next")).status_code == 200


def test_without_a_key_only_loopback_addresses_are_allowed(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")}
    environment |= {"PYTHONPATH": str(ROOT), "GLM_API_KEY": ""}
    no_file = "import settings; settings.ENV_FILE = settings.ROOT / 'no.env'; settings.Settings.model_config['env_file'] = None"
    code = f"{no_file}; import api.server as server; raise SystemExit(server.main([]))"

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 2
    assert "GLM_API_KEY is not set" in done.stderr and "start.sh" in done.stderr


def test_an_invalid_setting_is_named_and_exits_with_two(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLM_QUEUE_SIZE": "none"}
    command = [sys.executable, "-m", "api.server"]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 2 and "GLM_QUEUE_SIZE" in done.stderr
