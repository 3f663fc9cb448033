"""Runs an engine around a fake model."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from fake_model import FakeRunner, fake_model

from api.engine.engine import Engine
from api.engine.loaded_model import Model
from api.engine.request import Delta, Done, Event, Failed, Request, SamplingParams

WAIT_S = 30.0


class Driver:
    """An engine around a fake model, and the events of each request."""

    def __init__(self, queue_size: int = 4, load: Callable[..., Model] | None = None, **options) -> None:
        self.model = fake_model(**options)
        self.engine = Engine(load or (lambda progress: self.model), queue_size)
        self.engine.start()

    @property
    def runner(self) -> FakeRunner:
        assert isinstance(self.model.runner, FakeRunner)
        return self.model.runner

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, self.engine.stats()
            time.sleep(0.002)

    def ready(self) -> Driver:
        self.until(lambda: self.engine.stats().state != "loading")
        return self

    def ask(self, text: str, name: str = "r", **fields) -> queue.Queue[Event]:
        """`fields` of Request or SamplingParams."""
        events: queue.Queue[Event] = queue.Queue()
        ids = tuple(self.model.vocabulary.encode(text))
        of_request = {key: fields.pop(key) for key in ("images", "salt", "probe", "deadline_s") if key in fields}
        request = Request(name, ids, SamplingParams(**{"max_tokens": 1000, **fields}), **of_request)
        self.engine.submit(request, events.put)
        return events


def read(events: queue.Queue[Event]) -> tuple[str, Done | Failed]:
    text = ""
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, Delta):
            text += event.text
        else:
            return text, event
