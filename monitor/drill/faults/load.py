"""Load: more than the queue holds, and the heavy but legal traffic of many users."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from monitor.drill.context import FaultContext
from monitor.drill.faults.processes import Inject, wait_for
from monitor.drill.traffic import Traffic, send_question
from monitor.observe import external_engine
from monitor.observe.http_exchange import exchange

LEGAL = ("text", "picture", "schema", "abort")


@contextmanager
def saturate(context: FaultContext) -> Iterator[None]:
    """Constantly more questions than slots and queue can hold."""
    stop = threading.Event()
    url, key = context.settings.api_base_url, context.key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    metrics = external_engine.parse_metrics(exchange(f"{url}/metrics", 5.0, headers=headers).body.decode())
    info = json.loads(exchange(f"{url}/info", 5.0, headers=headers).body)
    width = info["limits"]["queue_size"] + int(metrics["glm_num_slots"]) + 16

    def send_questions() -> None:
        while not stop.is_set():
            reply = send_question(url, key, 120, tokens=256)
            if reply.status != 200:
                error = (reply.json() or {}).get("error")
                if isinstance(error, dict) and error.get("code") == "queue_full":
                    context.queue_full_at.append(time.monotonic())
                stop.wait(0.2)

    context.queue_full_at, context.checked_until = [], time.monotonic()
    clients = [threading.Thread(target=send_questions, daemon=True) for _ in range(width)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join(5)


def why_queue_not_full(context: FaultContext) -> str:
    """Empty if a question was rejected for a full queue since the last call; otherwise why the fault does not count."""
    since, context.checked_until = context.checked_until, time.monotonic()
    if any(at >= since for at in context.queue_full_at):
        return ""
    return f"no question was rejected for {context.checked_until - since:.0f} s, so the queue was not full"


def queue_full_summary(context: FaultContext) -> str:
    gaps = [after - before for before, after in itertools.pairwise(context.queue_full_at)]
    return f"{len(context.queue_full_at)} questions rejected, at most {max(gaps, default=0):.0f} s between two"


def users(streams: int, kinds: tuple[str, ...] = LEGAL, pause_s: float = 0.0) -> Inject:
    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        traffic = context.traffic = Traffic(context.settings.api_base_url, context.key)
        try:
            with traffic.running(streams, kinds, pause_s):
                yield
        finally:
            context.traffic = None

    return make


def summary(context: FaultContext) -> str:
    return context.traffic.summary() if context.traffic else ""


@contextmanager
def under_way(context: FaultContext) -> Iterator[None]:
    """Begins when the first users have been answered."""
    traffic = context.traffic
    assert traffic is not None
    wait_for(lambda: traffic.outcomes["answered"] > 0, "no user is answered")
    yield
