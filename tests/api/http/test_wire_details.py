"""What clients, browsers and proxies expect of the connection. In process where that is enough, else on real sockets."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from served import KEY, chat_body
from server_process import HEADERS, WAIT_S, Server

from api import __version__
from api.server import KEEP_ALIVE_S


def exchange(server: Server, data: bytes) -> bytes:
    """All that the server sends until it closes the connection, or for two seconds."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=2) as wire:
        wire.sendall(data)
        answer = b""
        try:
            while piece := wire.recv(65536):
                answer += piece
        except TimeoutError:
            answer += b"<still open>"
        return answer


def test_head_version_and_ping(serve) -> None:
    client = serve().client

    assert client.head("/v1/models").status_code == 200 and client.head("/v1/models").content == b""
    assert client.get("/version").json() == {"version": __version__}
    for method in (client.get, client.head):
        answer = method("/ping", headers={"Authorization": ""})
        assert answer.status_code == 200 and answer.content == b"", "open to load balancers"
    assert client.get("/version", headers={"Authorization": ""}).status_code == 401


def test_a_ping_of_a_server_that_does_not_answer_is_503(serve) -> None:
    def fail(progress):
        raise RuntimeError("no weights")

    served = serve(load=fail)
    served.engine.stats()
    answer = served.client.get("/ping")

    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(("origins", "allowed"), [("", None), ("https://page.example", "https://page.example")])
def test_a_preflight_needs_no_key(origins: str, allowed: str | None, serve) -> None:
    client = serve(cors_origins=origins).client
    asked = {
        "Authorization": "", "Origin": "https://page.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }  # fmt: skip

    answer = client.options("/v1/chat/completions", headers=asked)
    other = client.options("/v1/chat/completions", headers={**asked, "Origin": "https://elsewhere.example"})

    assert answer.is_success and answer.headers.get("access-control-allow-origin") == allowed
    assert "access-control-allow-origin" not in other.headers


def test_an_allowed_page_may_read_the_names_of_ignored_fields(serve) -> None:
    client = serve(cors_origins="https://page.example").client

    answer = client.post("/v1/chat/completions", json=chat_body(user="me"), headers={"Origin": "https://page.example"})

    assert "x-glm-ignored" in answer.headers["access-control-expose-headers"] and answer.headers["x-glm-ignored"] == "user"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('{"messages": [], "messages": [{"role": "user", "content": "x"}]}', "messages"),
        ('{"messages": [{"role": "user", "content": "x", "content": "y"}]}', "content"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
def test_a_name_given_twice_is_refused(body: str, name: str, path: str, serve) -> None:
    answer = serve().client.post(path, content=body)

    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "duplicate_key"


def test_a_connection_is_kept_as_long_as_the_server_says(start) -> None:
    server: Server = start()

    with httpx.Client(headers=HEADERS) as client:
        answer = client.get(f"{server.url}/v1/models")

    assert answer.headers["keep-alive"] == f"timeout={KEEP_ALIVE_S}" and KEEP_ALIVE_S > 15
    assert "connection" not in answer.headers


def test_a_body_that_is_framed_twice_ends_the_connection(start) -> None:
    server: Server = start()
    body = json.dumps(chat_body("hi")).encode()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n"
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

    once = exchange(server, f"{head}\r\n".encode() + chunked + smuggled)
    twice = exchange(server, f"{head}Content-Length: 5\r\n\r\n".encode() + chunked + smuggled)

    assert once.count(b"HTTP/1.1 200") == 2 and once.endswith(b"<still open>")
    assert twice.count(b"HTTP/1.1") == 1 and b"connection: close" in twice.lower() and not twice.endswith(b"<still open>")
    server.until(lambda health: health["state"] == "idle", WAIT_S)
