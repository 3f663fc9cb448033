"""The same attacks on the demo model: afterwards its answers are the same, and memory, threads and files did not grow."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from ports import free_port
from served import chat_body, text_part, wait_for
from server_process import HEADERS, WAIT_S, Server
from test_demo_model import IMAGE
from test_hostile import BROKEN, IMAGES, NOTHING, SCHEMAS, URL, URLS, bound, data_part, held, raw, status

QUESTION = chat_body([IMAGE, text_part("How many red shapes are there?")], temperature=0, max_tokens=60)
GROWTH_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    command = [sys.executable, "-m", "api.server", "--model", "models/shapes"]
    log = tmp_path_factory.mktemp("hostile") / "api.log"
    made = Server(free_port(), log, command, GLM_FETCH_IMAGES="true", GLM_MAX_IMAGE_PIXELS="1000000")
    made.until(lambda health: health["state"] == "idle", 300)
    yield made
    made.process.kill()
    made.process.wait(WAIT_S)


def storm(server: Server) -> None:
    with ThreadPoolExecutor(12) as pool:  # some of them wait for the server to close the connection
        answers = [(pool.submit(raw, server, data, 0 in statuses), statuses) for data, statuses in BROKEN]
    for future, statuses in answers:
        assert status(future.result()) in statuses
    for data in IMAGES.values():
        assert server.post(chat_body([data_part(data)], max_tokens=2)).status_code in (200, 400, 413)
    for url in URLS:
        part = {"type": "image_url", "image_url": {"url": url.replace("{port}", str(server.port))}}
        assert server.post(chat_body([part])).status_code == 400
    for schema in SCHEMAS:
        assert server.post(bound(schema)).status_code in (200, 400)
    assert server.post(chat_body("x" * 100_000_000)).status_code == 413
    assert server.post(chat_body("word " * 10_000)).status_code == 400
    for seconds in (0.01, 0.1, 0.3):
        with contextlib.suppress(httpx.TimeoutException):
            server.post({**QUESTION, "n": 3}, timeout=seconds)


def answer(server: Server) -> tuple[str, Any]:
    message = server.post(QUESTION).json()["choices"][0]["message"]
    return message["content"], message.get("reasoning")


def test_answers_and_resources_are_unchanged_afterwards(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    first = answer(server)
    storm(server)  # once, so that caches, pools and heaps reach their final size
    wait_for(lambda: held(server) == NOTHING)
    before = (process.memory_info().rss, process.num_fds(), process.num_threads())

    for _ in range(2):
        storm(server)

    assert "1" in first[0] or "one" in first[0].lower()
    assert answer(server) == first
    wait_for(lambda: held(server) == NOTHING)
    wait_for(lambda: process.num_fds() <= before[1] + 2)
    assert process.num_threads() <= before[2] + 2
    assert process.memory_info().rss < before[0] + GROWTH_BYTES
    for url in ("/health", "/metrics", "/v1/models"):
        assert httpx.get(f"{server.url}{url}", headers=HEADERS, timeout=WAIT_S).status_code == 200
    log = server.log.read_text()
    assert URL in log and not any(word in log for word in ("request_failed", "stream_failed", "integrity_lost", "ASGI"))
