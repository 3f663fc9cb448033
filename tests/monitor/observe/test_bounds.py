"""Whatever a server sends and whatever lies in a file's place, the checker reads a bounded part of it, in bounded time."""

from __future__ import annotations

import json
import os
import random
import smtplib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from monitor.observe import http_exchange, observe, processes
from monitor.observe.api_probe import Prober
from monitor.observe.http_exchange import exchange
from monitor.observe.small_file import read_small
from monitor.tell import channels
from monitor.tell.channels import Mail

HEAD = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def sending(head: bytes, piece: bytes) -> Iterator[tuple[int, list[int]]]:
    """A server that sends `head`, then `piece` for ever. Yields its port and a counter of the bytes that it could send."""
    gone, sent = threading.Event(), [0]

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.sendall(head)
            while not gone.is_set():
                connection.sendall(piece)
                sent[0] += len(piece)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1], sent
    gone.set()
    listener.close()


@pytest.mark.parametrize(
    ("head", "piece", "detail"),
    [
        (HEAD + b"\r\n", b"x" * 65536, "the body has more than"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n", "the body has more than"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"f" * 4096, "LineTooLong"),
        (b"", b"x" * 65536, "BadStatusLine|LineTooLong"),
        (HEAD + b"X: ", b"x" * 65536, "LineTooLong"),
        (HEAD, b"X: y\r\n" * 100, "more than 100 headers"),
    ],
)
def test_an_endless_reply_ends_at_its_limit(head, piece, detail):
    with sending(head, piece) as (port, sent):
        reply = exchange(f"http://127.0.0.1:{port}/health", 30)

    assert reply.outcome == "failed" and reply.seconds < 25
    assert any(part in reply.detail for part in detail.split("|")), reply.detail
    assert sent[0] < 32 * 2**20


@pytest.mark.parametrize(
    ("piece", "detail"),
    [(b"x" * 65536, "a line of the stream has more than"), (b"data: {}\n" * 4096, "the stream has more than"), (b": x\n\n" * 4096, "the stream has more than")],
)
def test_an_endless_answer_ends_at_its_limit(piece, detail, monkeypatch):
    monkeypatch.setattr(http_exchange.bounded_lines, "__defaults__", (2**20, 2**18))
    with sending(HEAD + b"\r\n", piece) as (port, sent):
        answer = Prober(f"http://127.0.0.1:{port}", "", "", random.Random(1)).ask_text(30)

    assert answer.outcome == "failed" and detail in answer.detail
    assert sent[0] < 32 * 2**20


def test_a_body_of_brackets_is_no_json():
    assert http_exchange.Reply("answered", 0.0, 200, b"[" * 100_000).json() is None


def test_surrogates_do_not_get_past_the_parser():
    lone = {"\ud800x": ["\udfff", "\U0001f600"]}

    assert http_exchange.parse_json(json.dumps(lone)) == {"?x": ["?", "\U0001f600"]}
    assert http_exchange.parse_json(json.dumps({"a": "\u00e9"}).encode()) == {"a": "\u00e9"}
    with pytest.raises(ValueError):
        http_exchange.parse_json(b'"\xed\xa0\x80"')


def test_an_endless_mail_server_ends_at_its_limit(monkeypatch):
    monkeypatch.setattr(channels, "REPLIES_LIMIT_BYTES", 2**18)
    with sending(b"", b"220-welcome\r\n" * 1000) as (port, _):
        assert "sends more than 262144 bytes" in Mail(f"smtp://127.0.0.1:{port}/").send("text", "page", [])
    assert issubclass(channels._SmtpSsl, smtplib.SMTP_SSL) and channels._SmtpSsl.getreply is channels._Smtp.getreply


@pytest.mark.parametrize("kind", ["pipe", "folder", "large", "device", "brackets"])
def test_what_is_no_small_file_holds_nobody(tmp_path, kind):
    for path in (tmp_path / observe.HEARTBEAT, processes.record_path(tmp_path, "api")):
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "brackets":
            path.write_bytes(b"[" * 100_000)
        else:
            path.write_bytes(b" " * (2**20 + 1))
    started = time.monotonic()

    assert observe.read_heartbeat(tmp_path, None, observe.now()) is None
    assert processes.read_record(tmp_path, "api") is None
    if kind != "brackets":
        with pytest.raises(OSError):
            read_small(tmp_path / observe.HEARTBEAT)
    assert time.monotonic() - started < 2
