"""The page's HTTP client: health, info, and the classification of failures."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from ports import free_port
from web_fake_api import FakeApi

from web.api_client import answer_stream, client
from web.api_client.client import ApiClient, ApiError, classify_error


def test_health_has_the_state_and_the_loading_progress(fake_api: FakeApi) -> None:
    fake_api.health = {"state": "loading", "progress": 0.4, "model": "glm-shapes-demo"}

    health = ApiClient(fake_api.url).health()

    assert (health.state, health.progress, health.ready) == ("loading", 0.4, False)


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_an_idle_or_busy_api_is_ready(fake_api: FakeApi, state: str) -> None:
    fake_api.health["state"] = state

    assert ApiClient(fake_api.url).health().ready


def test_an_unreachable_api_has_the_state_down() -> None:
    assert ApiClient(f"http://127.0.0.1:{free_port()}").health().state == "down"


def test_a_response_that_trickles_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STATUS_DEADLINE_S", 0.3)
    gone = threading.Event()

    def trickle() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with suppress(OSError):
            while not gone.wait(0.05):
                connection.sendall(b" ")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=trickle)
        server.start()
        started = time.monotonic()

        assert ApiClient(f"http://127.0.0.1:{listener.getsockname()[1]}").health_body() == {}

        assert time.monotonic() - started < 2
        gone.set()
        server.join()


def test_info_has_the_model_and_what_the_demo_knows(fake_api: FakeApi) -> None:
    info = ApiClient(fake_api.url).info()

    assert info.model == "glm-shapes-demo"
    assert info.demo
    assert info.knows["zh"] == "它认识彩色图形和印刷文字。"
    assert info.limits["max_images"] == 4


def test_a_proxy_in_the_environment_never_sees_a_call(fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")

    assert ApiClient(fake_api.url).info().model == "glm-shapes-demo"


def test_a_wrong_key_has_its_own_kind_of_error() -> None:
    with FakeApi(key="right") as fake, pytest.raises(ApiError) as caught:
        ApiClient(fake.url, "wrong").info()

    assert caught.value.kind == "bad_key"


def test_the_right_key_opens_the_api() -> None:
    with FakeApi(key="right") as fake:
        assert ApiClient(fake.url, "right").info().model == "glm-shapes-demo"


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (401, {"code": "invalid_api_key"}, "bad_key"),
        (413, {"message": "too many bytes"}, "too_large"),
        (400, {"message": "`temperature` must be <= 2. Given: 9"}, "refused"),
        (400, {"code": "context_length_exceeded"}, "too_long"),
        (404, {"code": "model_not_found"}, "refused"),
        (429, {}, "key_limit"),
        (429, {"code": "rate_limit_exceeded"}, "key_limit"),
        (429, {"code": "concurrency_limit_exceeded"}, "key_limit"),
        (503, {"code": "queue_full", "message": "The queue is full: 32 requests are waiting."}, "queue_full"),
        (503, {"code": "loading"}, "loading"),
        (503, {"code": "draining"}, "draining"),
        (503, {"code": "dead", "message": "The model is not running: loading failed"}, "unavailable"),
        (503, {}, "unavailable"),
        (500, {"message": "oops"}, "broken"),
        (0, {"code": "draining"}, "draining"),
        (0, {"code": "internal_error"}, "broken"),
    ],
)
def test_each_error_of_the_api_has_a_kind(status: int, error: dict[str, str], kind: str) -> None:
    assert classify_error(status, error).kind == kind


@contextmanager
def endless(head: bytes, piece: bytes) -> Iterator[str]:
    """A server that never stops sending. Yields its URL."""
    gone = threading.Event()

    def send() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + head)
            while not gone.is_set():
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=send)
        server.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        gone.set()
        server.join()


def test_an_endless_body_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BODY_LIMIT_BYTES", 2**18)
    monkeypatch.setattr(client, "STATUS_DEADLINE_S", 60.0)

    with endless(b"\r\n", b"x" * 65536) as url:
        assert ApiClient(url).health_body() == {}


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 65536, b": queue_position=1\n" * 4096])
def test_an_endless_answer_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch, piece: bytes) -> None:
    monkeypatch.setattr(answer_stream, "LINE_LIMIT_BYTES", 2**18)
    monkeypatch.setattr(answer_stream, "STREAM_LIMIT_BYTES", 2**20)

    with (
        endless(b"\r\n", piece) as url,
        answer_stream.AnswerStream(ApiClient(url), {}) as stream,
        pytest.raises(ApiError, match="longer than any answer"),
    ):
        for _ in stream.batches():
            pass


def test_a_body_of_brackets_is_no_answer() -> None:
    with endless(b"Content-Length: 200000\r\n\r\n", b"[" * 200_000) as url:
        assert ApiClient(url).health_body() == {}
