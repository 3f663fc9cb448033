"""The server as a process: real sockets, real signals. The model is the fake one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import KEY, chat_body, sse_data, wait_for

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
HEADERS = {"Authorization": f"Bearer {KEY}"}


class Server:
    def __init__(self, port: int, log: Path, **environment: str) -> None:
        self.port, self.log = port, log
        self.url = f"http://127.0.0.1:{port}"
        settings = {"GLM_API_HOST": "127.0.0.1", "GLM_API_PORT": str(port), "GLM_API_KEY": KEY, **environment}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fake_server.py"))],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **settings}, stdout=out, stderr=out,
            )  # fmt: skip

    def health(self) -> dict[str, Any]:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).json()
        except httpx.TransportError:
            return {"state": "down"}

    def until(self, condition: Callable[[dict[str, Any]], bool], limit_s: float = WAIT_S) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        while not condition(health := self.health()):
            assert time.monotonic() < deadline, f"{health}\n{self.log.read_text()}"
            time.sleep(0.02)
        return health

    def until_logged(self, text: str) -> str:
        """The log, once it has `text`: a line about a request comes after its answer."""
        wait_for(lambda: text in self.log.read_text())
        return self.log.read_text()

    def post(self, body: dict[str, Any], timeout: float = WAIT_S) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=timeout)

    def open_stream(self, stack: contextlib.ExitStack, content: str) -> httpx.Response:
        body = chat_body(content, stream=True)
        request = httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=WAIT_S)
        return stack.enter_context(request)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def run(**environment: str) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        servers.append(Server(port, tmp_path / f"api-{len(servers)}.log", **environment))
        servers[-1].until(lambda health: health["state"] == "idle")
        return servers[-1]

    yield run
    for server in servers:
        server.process.kill()
        server.process.wait(WAIT_S)


def test_a_client_that_leaves_a_stream_stops_the_work_within_a_second(start) -> None:
    server = start(FAKE_TOKEN_S="0.05")  # the answer would take 50 s
    with contextlib.ExitStack() as stack:
        stream = server.open_stream(stack, "x" * 1000)
        next(stream.iter_lines())
    left = time.monotonic()

    health = server.until(lambda health: health["running"] == 0)

    assert time.monotonic() - left < 5  # a second, and patience with a slow machine
    assert health["state"] == "idle" and health["steps"] < 200
    server.until_logged("failure=client_gone")


def test_a_client_that_leaves_a_plain_request_stops_the_work_within_a_second(start) -> None:
    server = start(FAKE_TOKEN_S="0.05")

    with pytest.raises(httpx.ReadTimeout):
        server.post(chat_body("x" * 1000), timeout=1.0)
    left = time.monotonic()
    server.until(lambda health: health["running"] == 0)

    assert time.monotonic() - left < 5
    server.until_logged("status=499")


def test_a_client_that_leaves_while_it_waits_frees_its_place(start) -> None:
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


def test_sigterm_lets_a_running_answer_finish_and_then_ends_with_zero(start) -> None:
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


def test_a_second_signal_ends_it_at_once(start) -> None:
    server = start(GLM_DRAIN_S="600")
    with contextlib.ExitStack() as stack:
        server.open_stream(stack, "HANG")
        server.process.send_signal(signal.SIGINT)
        server.until(lambda health: health["state"] == "draining")
        server.process.send_signal(signal.SIGINT)

        assert server.process.wait(WAIT_S) == 0


def test_health_goes_on_answering_while_the_engine_hangs(start) -> None:
    server = start()
    with contextlib.ExitStack() as stack:
        server.open_stream(stack, "HANG")
        before = server.until(lambda health: health["phase"] == "prefill")

        assert server.health()["steps"] == before["steps"] == 0
        assert server.health()["state"] == "busy"


def test_a_client_that_sends_too_much_still_reads_why(start) -> None:
    server = start(GLM_MAX_BODY_BYTES="100000")

    response = server.post(chat_body("x" * 5_000_000))

    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_client_that_is_turned_away_while_it_sends_still_reads_why(start) -> None:
    server = start(GLM_QUEUE_SIZE="1")
    with contextlib.ExitStack() as stack:
        for content, count in (("HANG", "running"), ("wait", "waiting")):
            server.open_stream(stack, content)
            server.until(lambda health, count=count: health[count] == 1)

        response = server.post(chat_body("x" * 5_000_000))

    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")


def test_a_port_that_is_taken_is_said_and_ends_with_one(start, tmp_path: Path) -> None:
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


def test_the_openai_client_understands_answers_streams_and_errors(start) -> None:
    import openai

    server = start()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    messages = [{"role": "user", "content": "hello"}]

    whole = client.chat.completions.create(model="fake", messages=messages)
    with client.chat.completions.create(model="fake", messages=messages, stream=True) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    again = client.chat.completions.create(model="fake", messages=[*messages, whole.choices[0].message, *messages])

    assert whole.choices[0].message.content == streamed == "I see 0 pictures. hello"
    assert again.usage is not None and again.usage.prompt_tokens > 16
    assert [model.id for model in client.models.list()] == ["fake"]
    with pytest.raises(openai.BadRequestError, match=r"`temperature` must be <= 2\. Given: 3"):
        client.chat.completions.create(model="fake", messages=messages, temperature=3)
    with pytest.raises(openai.APIError, match="The model failed on this request"):
        list(client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "FAIL"}], stream=True))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_without_a_key_it_refuses_to_listen_to_everyone(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")}
    environment |= {"PYTHONPATH": str(ROOT), "GLM_API_KEY": ""}
    no_file = "import settings; settings.ENV_FILE = settings.ROOT / 'no.env'; settings.Settings.model_config['env_file'] = None"
    code = f"{no_file}; import api.server as server; raise SystemExit(server.main([]))"

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 2
    assert "GLM_API_KEY is not set" in done.stderr and "start.sh" in done.stderr


def test_a_bad_setting_is_named_and_ends_with_two(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLM_QUEUE_SIZE": "none"}
    command = [sys.executable, "-m", "api.server"]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 2 and "GLM_QUEUE_SIZE" in done.stderr
