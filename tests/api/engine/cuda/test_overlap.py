"""The engine while a step is computed ahead: the same texts, whoever comes, ends or leaves in the meantime."""

from __future__ import annotations

import queue
import random
import time

from driving import WAIT_S, read
from prompts import ask, draw_image, request_for

from api.engine.engine import Engine
from api.engine.loaded_model import Model
from api.engine.request import Done, Event, Failed, Request

IMAGES = [draw_image(1, (150, 90))]
SAMPLING = [
    {}, {"temperature": 1.2, "top_k": 5, "top_p": 0.9, "seed": 3}, {"stop": ("e",)}, {"repetition_penalty": 1.3},
    {"thinking_tokens": 5, "thinking_end_ids": (65, 66)}, {"min_tokens": 9},
    *[{}, {"temperature": 0.9, "top_k": 3, "seed": 4, "repetition_penalty": 1.1}, {"stop": ("a",)}] * 8,  # those that leave the choice to the device
]  # fmt: skip


def requests(model: Model) -> list[Request]:
    rng = random.Random(5)
    made = []
    for number in range(40):
        images = IMAGES if number % 7 == 3 else []
        text = ask("a" * rng.randrange(30) + "What is it?", len(images))
        made.append(request_for(model, [text], images, name=f"{number}", max_tokens=rng.choice((1, 2, 31, 32, 33, 90)), **rng.choice(SAMPLING)))
    return made


def answers(model: Model, pause_s: float) -> list[tuple[str, Done | Failed]]:
    engine = Engine(lambda progress: model, 99)
    engine.start()
    try:
        deadline = time.monotonic() + WAIT_S
        while engine.stats().state == "loading":
            assert time.monotonic() < deadline and not engine.stats().reason
            time.sleep(0.01)
        if model.runner.overlaps:  # the first prompt is cut by what steps took at the start
            assert engine._budget._pass.passes == len(model.runner.costs) > 10
        inboxes = []
        for number, request in enumerate(requests(model)):
            events: queue.Queue[Event] = queue.Queue()
            engine.submit(request, events.put)
            inboxes.append(events)
            time.sleep(pause_s * (number % 3))
            if number % 10 == 9:
                engine.abort(f"{number}")
        read_all = [read(events) for events in inboxes]
        while engine.stats().running:
            time.sleep(0.01)
        engine._scheduler.check()
        assert engine.stats().state == "idle"
        return read_all
    finally:
        engine.stop(WAIT_S)


def test_texts_equal_those_without_overlap(plain: Model, replayed: Model) -> None:
    ahead = []
    launch_next = replayed.runner.launch_next

    def counted(flight, sequences):
        ahead.append(launch_next(flight, sequences))
        return ahead[-1]

    replayed.runner.launch_next = counted
    expected, given = answers(plain, 0.0), answers(replayed, 0.004)

    whole = [number for number in range(len(expected)) if number % 10 != 9]  # the others were aborted
    for number in whole:
        text, end = expected[number]
        assert isinstance(end, Done) and isinstance(given[number][1], Done)
        assert (given[number][0], given[number][1].reason, given[number][1].completion_tokens) == (text, end.reason, end.completion_tokens)
    assert sum(flight is not None for flight in ahead) > 30
