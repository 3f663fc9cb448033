"""The runner of a CUDA device on a device that replays on the CPU: the same tokens as the eager path, in any company."""

from __future__ import annotations

import random

import pytest
from prompts import Steps, ask, draw_image, request_for

from api.engine.loaded_model import Model, SampledToken
from api.engine.scheduler import Batch

KINDS = [
    ([ask("Hello, what is this?")], []),
    ([ask("What is in the picture?", 1)], [draw_image(1, (150, 90))]),
    ([ask("And here? " * 9)], []),
]
SAMPLING = [{}, {"temperature": 1.2, "top_k": 5, "top_p": 0.9, "seed": 3}, {"temperature": 0.9, "seed": 4},
            {"repetition_penalty": 1.3}, {"logprobs": 2}, {"presence_penalty": 0.7, "frequency_penalty": 0.3},
            {"temperature": 0.8, "top_k": 4, "seed": 5, "repetition_penalty": 1.1, "presence_penalty": -0.5},
            {"frequency_penalty": 0.4, "logit_bias": ((5, 2.0),)}]  # fmt: skip
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}


def test_every_size_is_recorded(replayed: Model) -> None:
    captured = replayed.runner.graphs.captured

    assert [size.rows for size in captured if size.kind == "decode"] == [1, 2, 4, 7]
    for kind in ("prompt", "mixed"):
        assert [size.rows for size in captured if size.kind == kind] == [16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_tokens_equal_the_eager_path(kind: int, plain: Model, replayed: Model) -> None:
    request = request_for(plain, *KINDS[kind], max_tokens=24)
    before = replayed.runner._queue.replays

    assert Steps(replayed).run(request) == Steps(plain).run(request)
    assert replayed.runner._queue.replays == before + 24


def test_a_thousand_random_steps_give_the_tokens_of_the_eager_path(plain: Model, replayed: Model) -> None:
    """Arrivals, ends, preemptions, aborts, and lengths around the borders of pages."""
    answers = [churn(model) for model in (plain, replayed)]

    assert answers[0] == answers[1]


def test_penalties_leave_the_choice_to_the_device(plain: Model, replayed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request_for(plain, *KINDS[0], name=f"{n}", max_tokens=24, **(PENALTIES if n else {})) for n in range(3)]
    expected = Steps(plain).run(*asked)
    assert expected[0] != expected[1]

    def never(*args: object) -> None:
        raise AssertionError("the host has sampled")

    monkeypatch.setattr(replayed.runner._sampler, "sample", never)
    assert Steps(replayed).run(*asked) == expected


def test_a_step_that_is_dropped_counts_no_token_twice(plain: Model, replayed: Model) -> None:
    request = request_for(plain, *KINDS[0], max_tokens=24, **PENALTIES)
    expected = Steps(plain).run(request)[0]
    runner, steps = replayed.runner, Steps(replayed)
    sequence = steps.add(request)
    compute = runner.compute

    def with_a_step_ahead(batch: Batch) -> list[SampledToken]:
        flight = runner.launch(batch)
        if batch.decode and steps.scheduler.make_room_ahead(batch.decode):
            dropped = runner.launch_next(flight, batch.decode)
            assert dropped is not None
            runner.settle(dropped)
        return runner.collect(flight)

    runner.compute = with_a_step_ahead
    try:
        while steps.scheduler.has_work:
            steps.step()
    finally:
        runner.compute = compute

    assert sequence.output_ids == expected


def churn(model: Model) -> dict[str, list[int]]:
    rng = random.Random(20)
    steps = Steps(model, chunk_tokens=40, pages=20)  # too few for all: some are preempted
    sequences = []
    for number in range(1000):
        waiting = steps.scheduler.waiting
        if waiting < 3 and rng.random() < 0.4:
            messages, images = KINDS[rng.randrange(3)]
            length = rng.choice((1, 14, 15, 16, 17, 30, 33, 48))
            request = request_for(
                model, [*messages[:-1], ask("a" * rng.randrange(40) + messages[0]["content"][-1]["text"], len(images))],
                images, name=f"{number}", max_tokens=length, **rng.choice(SAMPLING),
            )  # fmt: skip
            sequences.append(steps.add(request))
        if sequences and rng.random() < 0.03:
            steps.scheduler.remove(rng.choice(sequences))
        steps.step()
    assert steps.scheduler.preemptions > 3 and len(sequences) > 50
    return {sequence.request.id: sequence.output_ids for sequence in sequences}


def test_a_resized_cache_gives_the_same_tokens(plain: Model, replayed: Model) -> None:
    """The runner is given its cache after loading; what was recorded for another one is not used again."""
    runner, pages = replayed.runner, replayed.capacity.pages
    request = request_for(plain, *KINDS[1], max_tokens=24)
    try:
        runner.resize_kv(40)
        assert runner.graphs.captured == ()
        assert int(runner._tables.tables[runner._padding_slot, 0]) == 41
        assert {len(kv) for kv in runner.decoder.kv} == {42 * replayed.capacity.page_tokens}
        runner.warm_up()
        while runner.prepare_next():
            pass
        assert Steps(replayed, pages=40).run(request) == Steps(plain).run(request)
    finally:
        runner.resize_kv(pages)
        runner.warm_up()
        while runner.prepare_next():
            pass
