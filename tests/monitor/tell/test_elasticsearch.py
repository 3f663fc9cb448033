"""The push to Elasticsearch, against a stand-in that indexes like it, and refuses, stalls, loses answers and accepts some."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from monitor import check
from monitor.tell import elasticsearch

BUSY = {"status": 429, "error": {"type": "es_rejected_execution_exception"}}
UNFIT = {"status": 400, "error": {"type": "document_parsing_exception"}}


class StandIn(ThreadingHTTPServer):
    """Indexes by id. `trouble(number, id)` says what becomes of a document; `mode` what becomes of the whole request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ok"
        self.trouble: Callable[[int, str], dict[str, Any] | None] = lambda number, name: None
        self.documents: dict[str, Any] = {}
        self.writes: list[str] = []
        self.requests: list[list[str]] = []
        self.headers: list[Any] = []
        self.released = threading.Event()
        self.url = f"http://ann:secret@127.0.0.1:{self.server_address[1]}/health-2026"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().split("\n")
        assert self.path == "/_bulk" and lines.pop() == "" and len(lines) % 2 == 0
        self.server.requests.append(lines)
        self.server.headers.append(self.headers)
        if self.server.mode == "stall":
            self.server.released.wait(60)
            return
        if self.server.mode in ("502", "429", "413"):
            self.answer(int(self.server.mode), b"no")
            return
        items = []
        for number, (action, document) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            name = json.loads(action)["index"]["_id"]
            item = self.server.trouble(number, name)
            if item is None:
                item = {"status": 200 if name in self.server.documents else 201}
                self.server.documents[name] = json.loads(document)
                self.server.writes.append(name)
            items.append({"index": {"_id": name, **item}})
        if self.server.mode == "lost answer":
            self.close_connection = True
        elif self.server.mode == "portal":
            self.answer(200, b"<html>Log in to the network</html>")
        else:
            self.answer(200, json.dumps({"errors": any("error" in i["index"] for i in items), "items": items}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def push(stand_in: StandIn, tmp_path: Path) -> Callable[..., str]:
    """push(number, folder) -> what is wrong, for the document of that number."""

    def send(number: int, folder: str = "logs") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        document = {"@timestamp": f"2026-11-27T{number // 60:02}:{number % 60:02}:00.000Z", "message": f"number {number} of \u2028 lines"}
        return elasticsearch.push(stand_in.url, document, tmp_path / folder)

    return send


def numbers(stand_in: StandIn) -> list[int]:
    return sorted(int(document["message"].split()[1]) for document in stand_in.documents.values())


def waiting(tmp_path: Path) -> int:
    return len(elasticsearch._waiting(tmp_path / "logs"))


def test_a_run_pushes_its_document(stand_in: StandIn, service, make_settings) -> None:
    settings = make_settings(service).model_copy(update={"elasticsearch_url": SecretStr(stand_in.url)})
    check.run(settings, random.Random(1))

    (document,) = stand_in.documents.values()
    assert document["event"]["action"] == "health_check"
    assert json.loads(stand_in.requests[0][0])["index"]["_index"] == "health-2026"
    assert stand_in.headers[0]["Authorization"] == "Basic " + base64.b64encode(b"ann:secret").decode()
    assert not (settings.log_dir / elasticsearch.QUEUE).exists()


def test_through_every_trouble_nothing_is_lost_and_nothing_is_there_twice(
    stand_in: StandIn, push: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elasticsearch, "SEND_LIMIT_S", 0.5)
    number = 0
    for mode, problem in [
        ("ok", ""), ("502", "HTTP 502; 1 documents wait"), ("stall", "no answer within 0.5 s; 2 documents wait"),
        ("429", "HTTP 429; 3 documents wait"), ("lost answer", "RemoteDisconnected"), ("portal", "does not say what became of each"),
        ("413", "HTTP 413"), ("ok", ""), ("lost answer", "RemoteDisconnected"), ("ok", ""),
    ]:  # fmt: skip
        stand_in.mode = mode
        said = push(number)
        assert problem in said and bool(problem) == bool(said), (mode, said)
        assert "secret" not in said
        number += 1

    assert numbers(stand_in) == list(range(number)), "each once, as they have their ids"
    assert waiting(tmp_path) == 0
    assert stand_in.writes.count(stand_in.writes[-2]) > 1, "the same document was sent again"


def test_of_a_request_that_is_accepted_in_part_the_rest_is_sent_again(stand_in: StandIn, push: Callable[..., str], tmp_path: Path) -> None:
    stand_in.mode = "502"
    for number in range(9):
        push(number)
    stand_in.mode = "ok"
    stand_in.trouble = lambda place, name: (None, BUSY, UNFIT)[place % 3] if place < 9 else {"status": 503, "error": {"type": "unavailable"}}
    said = push(9)

    assert "rejected 3 of 10: {'type': 'document_parsing_exception'}" in said
    assert "too busy for 4 of 10 documents, which wait" in said
    assert waiting(tmp_path) == 4 and numbers(stand_in) == [0, 3, 6]

    stand_in.trouble = lambda place, name: None
    assert push(10) == ""
    assert numbers(stand_in) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert len(stand_in.writes) == len(set(stand_in.writes)), "what was accepted is not sent again"
    assert len(stand_in.requests[-1]) == 10


def test_the_queue_is_bounded_and_says_what_it_drops(
    stand_in: StandIn, push: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elasticsearch, "QUEUE_LIMIT", 5)
    stand_in.mode = "502"
    said = [push(number) for number in range(8)]

    assert "dropped" not in said[4]
    assert said[5].endswith("5 documents wait; 1 dropped: <= 5 documents may wait")
    assert waiting(tmp_path) == 5
    stand_in.mode = "ok"
    assert push(8).endswith("1 dropped: <= 5 documents may wait")
    assert numbers(stand_in) == [4, 5, 6, 7, 8], "the newest"


def test_a_run_that_is_killed_while_it_sends_leaves_its_document(stand_in: StandIn, push: Callable[..., str], tmp_path: Path) -> None:
    stand_in.mode = "stall"
    sending = threading.Thread(target=push, args=(0,), daemon=True)
    sending.start()
    deadline = time.monotonic() + 30
    while not stand_in.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert waiting(tmp_path) == 1, "it is on the disk before Elasticsearch has answered"


def test_two_services_of_one_machine_keep_their_own_documents(stand_in: StandIn, push: Callable[..., str]) -> None:
    assert (push(0, "one"), push(0, "two")) == ("", "")
    assert len(stand_in.documents) == 2


def test_of_a_damaged_queue_the_whole_documents_are_sent(stand_in: StandIn, push: Callable[..., str], tmp_path: Path) -> None:
    stand_in.mode = "502"
    for number in range(3):
        push(number)
    queue = tmp_path / "logs" / elasticsearch.QUEUE
    lines = queue.read_text(encoding="utf-8").split("\n")
    queue.write_text("\n".join([lines[0], lines[1], lines[2][:10], *lines[3:]]), encoding="utf-8")
    stand_in.mode = "ok"

    assert push(3) == ""
    assert numbers(stand_in) == [0, 2, 3]
