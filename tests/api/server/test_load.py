"""Many concurrent clients, some of which disconnect: afterwards neither the API nor the engine holds anything."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from ports import free_port
from served import Served, chat_body, image_part, text_part, wait_for
from server_process import HEADERS, WAIT_S

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def listening(serve) -> Iterator[tuple[Served, str]]:
    """An app in this process behind a real socket; few pages, so that requests preempt each other."""
    served = serve(slots=4, pages=60, context_tokens=512, token_s=0.0005, queue_size=24)
    port = free_port()
    config = uvicorn.Config(served.app, host="127.0.0.1", port=port, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield served, f"http://127.0.0.1:{port}/v1/chat/completions"
    server.should_exit = True
    thread.join(WAIT_S)


def rush(url: str, seed: int, wrong: list[str]) -> None:
    rng = random.Random(seed)
    for number in range(10):
        colours = rng.choices(COLOURS, k=rng.randrange(3))
        question = f"{seed}-{number}-{'x' * rng.randrange(120)}"
        content = [*(image_part(colour) for colour in colours), text_part(question)]
        body = chat_body(content, n=rng.choice((1, 1, 2)), stream=rng.random() < 0.5)
        leaves = rng.random() < 0.4
        with contextlib.suppress(httpx.ReadTimeout, httpx.RemoteProtocolError):
            limits = httpx.Timeout(WAIT_S, read=rng.uniform(0.01, 0.2) if leaves else WAIT_S)
            with httpx.stream("POST", url, json=body, headers=HEADERS, timeout=limits) as answer:
                if answer.status_code == 503:
                    continue
                if body["stream"] and leaves:
                    next(answer.iter_lines())
                    continue
                answer.read()
                expected = f"I see {len(colours)} pictures. {question}"
                if not body["stream"] and expected not in answer.json()["choices"][0]["message"]["content"]:
                    wrong.append(answer.text)


def test_load_with_random_aborts_leaves_nothing_behind(listening) -> None:
    served, url = listening
    admission = served.app.state.server.admission
    wrong: list[str] = []
    counted: list[int] = []
    for batch in range(3):
        threads = [threading.Thread(target=rush, args=(url, 10 * batch + n, wrong)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        wait_for(lambda: (served.engine.stats().running, served.engine.stats().waiting) == (0, 0))
        wait_for(lambda: (admission.active, admission.tokens) == (0, 0))
        with served.engine._wake:
            served.engine._scheduler.check()
        counted.append(threading.active_count())

    assert wrong == []
    assert counted[-1] <= counted[0] + 1 and served.engine.stats().kv_used_tokens == 0
    assert served.chat("hello").json()["choices"][0]["message"]["content"] == "I see 0 pictures. hello"
