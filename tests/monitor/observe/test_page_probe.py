"""The page's token, against the page's own access control."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import uvicorn

from monitor.judge.evidence import Process
from monitor.judge.page_rules import judge_page
from monitor.judge.verdict import Limits
from monitor.observe.page_probe import probe_page
from web.access import Access


async def answer(scope, receive, send) -> None:
    """Everything that a page has behind its access control, as short as can be."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept", "subprotocol": "streamlit"})
        await send({"type": "websocket.close", "code": 1000})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    """The port of a page that was started with the token `old`."""
    server = uvicorn.Server(uvicorn.Config(Access(answer, "old"), host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    ("token", "word", "rule", "cure"),
    [("old", "healthy", "page_answers", False), ("new", "broken", "token_refused", False), (None, "broken", "token_refused", False)],
)
def test_a_token_that_the_page_was_not_started_with_restarts_nothing(page, make_settings, token, word, rule, cure) -> None:
    seen = probe_page(make_settings(page, web_token=token), with_script=True)

    verdict = judge_page(replace(seen, process=Process("runs", 5, 900.0, "ours")), Limits())

    assert (verdict.word, verdict.rule, verdict.cure) == (word, rule, cure)
    assert (seen.token is None) == (word == "healthy"), "asked only where the WebSocket was refused"


def test_a_websocket_that_fails_with_the_right_token_is_cured(service, behaviour, make_settings) -> None:
    behaviour.page_token, behaviour.websocket = "same", False

    seen = probe_page(make_settings(service, web_token="same"), with_script=False)

    verdict = judge_page(replace(seen, process=Process("runs", 5, 900.0, "ours")), Limits())
    assert (verdict.rule, verdict.cure) == ("websocket", True)
