"""Malformed and hostile requests to one running server, which must be unharmed afterwards."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from ports import free_port
from served import KEY, chat_body, image_part, text_part, wait_for
from server_process import HEADERS, WAIT_S, Server

URL = "/v1/chat/completions"
QUESTION = [image_part("red"), text_part("hello")]
ANSWER = "I see 1 pictures. hello"
NOTHING = {"requests": 0, "tokens": 0, "running": 0, "waiting": 0, "arriving": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    log: Path = tmp_path_factory.mktemp("hostile") / "api.log"
    made = Server(free_port(), log, GLM_FETCH_IMAGES="true", GLM_MAX_IMAGE_PIXELS="1000000", FAKE_TOKEN_S="0.001")
    made.until(lambda health: health["state"] == "idle")
    yield made
    made.process.kill()
    made.process.wait(WAIT_S)


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """Afterwards the same question gets the same answer, and nothing is held."""
    yield
    answer = server.post(chat_body(QUESTION))
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
    wait_for(lambda: held(server) == NOTHING)


def held(server: Server) -> dict[str, int]:
    text = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=WAIT_S).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    names = {"requests": "num_requests_admitted", "tokens": "num_tokens_admitted", "running": "num_requests_running",
             "waiting": "num_requests_waiting", "arriving": "body_bytes_arriving"}  # fmt: skip
    return {name: int(float(values[f"glm_{metric}"])) for name, metric in names.items()}


def raw(server: Server, data: bytes, finish: bool = False) -> bytes:
    """Send raw bytes; returns what arrives until the server closes the connection or 20 s pass."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire, contextlib.suppress(OSError):
        wire.sendall(data)
        if finish:
            wire.shutdown(socket.SHUT_WR)
        while piece := wire.recv(65536):
            answer += piece
    return answer


def request(body: bytes, *extra: str, length: int | None = None) -> bytes:
    lines = [f"POST {URL} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Connection: close",
             f"Content-Length: {len(body) if length is None else length}", *extra]  # fmt: skip
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def chunked(*pieces: bytes) -> bytes:
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(pieces)


GOOD = json.dumps(chat_body("hi")).encode()


# 0: the client closes its side before its request is complete, and the server closes without an answer.
BROKEN: list[tuple[bytes, set[int]]] = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),  # TLS to a plain port
    (b"\x00" * 1000, {0, 400}),
    (b"GET / HTTP/9.9\r\n\r\n", {400, 401}),
    (b"GET /health HTTP/1.1\r\n\r\n", {400}),  # no Host
    (b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", {400, 401, 414}),
    (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", {200, 400, 431}),
    (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"y" * 200_000 + b"\r\n\r\n", {400, 431}),
    (b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", {400}),
    (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n", {400, 401}),
    (b"GET /v1/models/%00%ff/../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {401}),
    (b"GET //health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {401}),
    (b"GET /health/../v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {401}),
    (b"GET /%68ealth/../metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {401}),
    (request(GOOD, length=-1), {400}),
    (request(GOOD, "Content-Length: 3"), {400}),
    (request(GOOD, length=10**15), {413}),
    (request(GOOD, "Content-Length: " + "9" * 5_000), {400}),
    (request(GOOD, length=len(GOOD) + 10), {0, 400}),  # less than announced
    (request(GOOD, length=5), {400}),
    (request(GOOD, "Transfer-Encoding: chunked"), {0, 400}),
    (chunked(b"zzz\r\n" + GOOD + b"\r\n0\r\n\r\n"), {0, 400}),
    (chunked(b"-5\r\nhello\r\n0\r\n\r\n"), {0, 400}),
    (chunked(b"ffffffffffffffffff\r\nx\r\n"), {0, 400}),
    (chunked(b"0\r\n\r\n"), {400}),
    (request(b"\xff\xfe\x00{"), {400}),
    (request(b'{"messages": "\xc3\x28"}'), {400}),
    (request(b"[" * 1_000_000), {400}),
    (request(b'{"a":' * 200_000), {400}),
    (request(b'{"tools":' + b"[" * 900 + b"]" * 900 + b"}"), {400}),
    (request(b'{"n": ' + b"9" * 5_000 + b"}"), {400}),
    (request(b'{"temperature": 1e999, "messages": []}'), {400}),
    (request(b'{"messages": null, "messages": []}'), {400}),
    (request(json.dumps({"messages": [{"role": "user", "content": "x"}] * 20_000}).encode()), {400}),
    (request(json.dumps(chat_body("x", stop=["\u0000"])).encode()), {200}),
    (request(json.dumps(chat_body("\x00\x7f\ufdd0\ufdd1\ufffd\u202e\U0010ffff")).encode()), {200}),
]  # fmt: skip


@pytest.mark.parametrize(("data", "statuses"), BROKEN)
def test_broken_http_and_json(data: bytes, statuses: set[int], server: Server) -> None:
    assert status(raw(server, data, finish=0 in statuses)) in statuses


def test_a_hundred_megabytes(server: Server) -> None:
    whole = server.post(chat_body("x" * 100_000_000))
    wire = httpx.post(f"{server.url}{URL}", content=iter([b"y" * 2**20] * 100), headers=HEADERS, timeout=WAIT_S)

    assert (whole.status_code, whole.json()["error"]["code"]) == (413, "body_too_large")
    assert wire.status_code == 413


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, **options)
    return buffer.getvalue()


IMAGES = {
    "bomb": png(100_000, 100_000, zlib.compress(b"\0" * 10_000_000)),
    "no side": png(0, 10),
    "huge side": png(2**31 - 1, 1),
    "too little data": png(500, 500, zlib.compress(b"\0")),
    "broken data": png(500, 500, b"not zlib"),
    "text bomb": saved("PNG")[:-12] + struct.pack(">I", 9) + b"zTXtk\0\0" + b"\0" * 11,
    "empty": b"",
    "text": b"<svg onload=alert(1)>",
    "tiff": saved("TIFF"),
    "pdf": saved("PDF"),
    "eps": saved("EPS"),
    "icon": saved("ICO"),
    "animated": saved("GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]),
}


def data_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_images(name: str, server: Server) -> None:
    answer = server.post(chat_body([data_part(IMAGES[name])]))

    assert answer.status_code in (400, 413) or (name == "text bomb" and answer.status_code == 200)
    if answer.status_code != 200:
        assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"


URLS = [
    "file:///etc/passwd", "/etc/passwd", "http://127.0.0.1:{port}/health", "http://[::ffff:127.0.0.1]/", "http://0/",
    "http://localhost/", "http://2130706433/", "http://169.254.169.254/latest/meta-data", "http://127.0.0.1\\@1.1.1.1/",
    "gopher://127.0.0.1/", "data:image/png;base64,%%%", "data:text/html,<b>", "x" * 100_000, "", "\u0000",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_hostile_urls(url: str, server: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": url.replace("{port}", str(server.port))}}

    answer = server.post(chat_body([part, text_part("what?")]))

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    assert "root:" not in answer.text and len(answer.text) < 500


def test_slow_senders_and_half_closed_sockets_hold_nothing(server: Server) -> None:
    """There are more of them than permits, and they do not block others."""
    wires = []
    for _ in range(60):
        wire = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        wire.sendall(request(GOOD, length=1000))
        wires.append(wire)
    wait_for(lambda: held(server)["arriving"] == 60 * len(GOOD))
    assert held(server)["requests"] == 0
    assert server.post(chat_body(QUESTION)).json()["choices"][0]["message"]["content"] == ANSWER
    for number, wire in enumerate(wires):
        wire.sendall(b" ")
        if number % 2:
            wire.shutdown(socket.SHUT_WR)
        wire.close()

    wait_for(lambda: held(server)["arriving"] == 0)


def test_a_client_that_closes_its_side_counts_as_disconnected(server: Server) -> None:
    """The server cannot tell whether it still reads, so the work for it ends."""
    body = json.dumps(chat_body("x" * 3000)).encode()

    assert raw(server, request(body), finish=True) == b""

    wait_for(lambda: held(server) == NOTHING)


def deep_schema() -> dict[str, Any]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(14):
        deep = {"type": "object", "properties": {"a": deep, "b": deep}, "required": ["a"]}
    return deep


SCHEMAS: list[dict[str, Any]] = [
    {"$ref": "#"}, {"$ref": "http://127.0.0.1/x"}, {"allOf": [{"type": "string"}] * 2_000}, deep_schema(),
    {"type": "string", "pattern": "(a{1,1000}){1,1000}"}, {"type": "string", "pattern": "["}, {"type": 5},
    {"enum": []}, {"type": "array", "minItems": 10**9}, {"not": {}}, {"const": "x" * 300_000},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:30])
def test_hostile_schemas(schema: dict[str, Any], server: Server) -> None:
    answer = server.post(bound(schema))

    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:  # without the name: the fake model's text does not match the schema
        assert answer.json()["error"]["param"] in ("response_format", None)


def bound(schema: dict[str, Any]) -> dict[str, Any]:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return chat_body("hi", response_format=response_format, max_tokens=2)


def test_load_with_aborts_leaks_nothing(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    server.post(chat_body(QUESTION))
    before = (process.num_fds(), process.memory_info().rss)

    def rush(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            body = chat_body(QUESTION if rng.random() < 0.5 else "x" * rng.randrange(400), n=rng.choice((1, 1, 3)))
            with contextlib.suppress(httpx.HTTPError):
                if rng.random() < 0.5:
                    server.post(body, timeout=rng.choice((0.02, 0.1, 0.5, WAIT_S)))
                    continue
                with httpx.stream(
                    "POST", f"{server.url}{URL}", json={**body, "stream": True}, headers=HEADERS
                ) as answer:
                    for number, _ in enumerate(answer.iter_lines()):
                        if number == rng.randrange(30):
                            break

    threads = [threading.Thread(target=rush, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)

    wait_for(lambda: held(server) == NOTHING)
    wait_for(lambda: process.num_fds() <= before[0] + 2)
    assert process.memory_info().rss < before[1] + 100 * 2**20


def test_the_log_has_no_secret_and_no_internal_error(server: Server) -> None:
    text = server.log.read_text()

    assert "event=request_failed" not in text and "event=stream_failed" not in text
    assert "Exception in ASGI" not in text
    assert KEY not in text and "base64" not in text
