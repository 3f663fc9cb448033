"""First come, first served, from a bounded queue."""

from __future__ import annotations

import random

import pytest

from api.engine.request import Picture, Request, Sampling, Sequence
from api.engine.scheduler import QueueFull, Scheduler


def sequence(name: str, pictures: int = 0) -> Sequence:
    shots = tuple(Picture(None, (1, 2, 2), 1) for _ in range(pictures))
    return Sequence(Request(name, (1,), Sampling(max_tokens=1), shots), deliver=lambda event: None)


def test_nothing_to_do_is_no_step() -> None:
    assert Scheduler(4).schedule() is None


def test_pictures_come_before_the_prefill_and_the_prefill_before_tokens() -> None:
    scheduler = Scheduler(4)
    one = sequence("a", pictures=2)
    scheduler.add(one)
    works = []
    for _ in range(5):
        step = scheduler.schedule()
        assert step is not None
        works.append(step.work)
        if step.work == "vision":
            one.pictures_encoded += 1
        if step.work == "prefill":
            one.first_token_at = 1.0

    assert works == ["vision", "vision", "prefill", "decode", "decode"]


def test_the_first_to_come_is_the_first_to_run() -> None:
    scheduler = Scheduler(4)
    first, second = sequence("first"), sequence("second")
    scheduler.add(first)
    scheduler.add(second)

    step = scheduler.schedule()
    assert step is not None and step.sequences == (first,)
    scheduler.remove(first)
    step = scheduler.schedule()
    assert step is not None and step.sequences == (second,)


def test_a_full_queue_refuses_one_more() -> None:
    scheduler = Scheduler(queue_size=2)
    for name in "abc":  # one will run, two may wait
        scheduler.add(sequence(name))

    with pytest.raises(QueueFull):
        scheduler.add(sequence("d"))


def test_positions_count_from_the_one_that_runs() -> None:
    scheduler = Scheduler(4)
    for name in "abc":
        scheduler.add(sequence(name))
    scheduler.schedule()

    assert [scheduler.position(name) for name in ("a", "b", "c", "other")] == [0, 1, 2, None]


def test_random_traffic_never_loses_or_doubles_a_sequence() -> None:
    rng = random.Random(3)
    scheduler = Scheduler(queue_size=5, max_running=2)
    inside: list[Sequence] = []
    for number in range(3000):
        match rng.randrange(3):
            case 0:
                one = sequence(str(number), pictures=rng.randrange(2))
                try:
                    scheduler.add(one)
                    inside.append(one)
                except QueueFull:
                    assert scheduler.waiting >= 5
            case 1:
                step = scheduler.schedule()
                assert (step is None) == (not inside)
                assert step is None or all(s in inside for s in step.sequences)
            case 2 if inside:
                gone = inside.pop(rng.randrange(len(inside)))
                scheduler.remove(gone)
                scheduler.remove(gone)
        assert sorted(s.request.id for s in scheduler.sequences()) == sorted(s.request.id for s in inside)
        assert scheduler.running <= 2 and scheduler.has_work == bool(inside)
