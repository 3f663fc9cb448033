"""The proof of recorded steps: right ones are used, wrong ones and a wrong sampler are switched off, answers stay right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from prompts import Steps, ask, request_for

from api.engine.cuda import runner as runner_module
from api.engine.cuda.runner import CudaRunner
from api.engine.loaded_model import Model

QUESTION = ([ask("Hello, what is this?")], [])


@pytest.fixture
def fresh(replayed: Model) -> Iterator[CudaRunner]:
    """A runner that has yet to be warmed up; as it was before, afterwards."""
    runner = replayed.runner
    runner.resize_kv(replayed.capacity.pages)
    runner.proofs.clear()
    yield runner
    runner._samples = True
    runner.resize_kv(replayed.capacity.pages)
    runner.warm_up()


def test_every_recorded_size_is_compared(fresh: CudaRunner) -> None:
    fresh.warm_up()

    sizes = len(fresh.graphs.captured)
    assert sizes == 16
    assert fresh.proofs["recorded steps"].startswith(f"used: {sizes} sizes compared")
    assert fresh.proofs["sampling"].startswith("used:")
    assert len(fresh.costs) == sizes and all(seconds > 0 for _, _, seconds in fresh.costs)
    assert {tokens for _, tokens, _ in fresh.costs} == {0, 16, 32, 64, 128, 256, 512}


@pytest.mark.parametrize("kind", ["decode", "prompt", "mixed"])
def test_a_wrong_recorded_step_switches_them_off(
    kind: str, fresh: CudaRunner, plain: Model, replayed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fresh.graphs.replay

    def wrong(size) -> None:
        right(size)
        if size.kind == kind:
            fresh._logits.mul_(1.5)

    monkeypatch.setattr(type(fresh.graphs), "replay", lambda graphs, size: wrong(size) if graphs is fresh.graphs else None)
    right = lambda size: fresh.graphs._replays[size]()  # noqa: E731
    fresh.warm_up()

    assert f"({kind} " in fresh.graphs.off
    assert fresh.proofs["recorded steps"].startswith("off: a recorded step")
    request = request_for(plain, *QUESTION, max_tokens=12)
    assert Steps(replayed).run(request) == Steps(plain).run(request)


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_recorded_step_that_miscounts_switches_them_off(
    kind: str, fresh: CudaRunner, plain: Model, replayed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = type(fresh.graphs).replay

    def wrong(graphs, size) -> None:
        right(graphs, size)
        if size.kind == kind:
            fresh._sampler.counts.add_(1)

    monkeypatch.setattr(type(fresh.graphs), "replay", wrong)
    fresh.warm_up()

    assert fresh.graphs.off == fresh.proofs["recorded steps"].removeprefix("off: ")
    assert f"({kind} " in fresh.graphs.off and fresh.graphs.off.endswith("counts tokens wrongly")
    request = request_for(plain, *QUESTION, max_tokens=12, frequency_penalty=0.5)
    assert Steps(replayed).run(request) == Steps(plain).run(request)


def test_a_wrong_sampler_leaves_the_choice_to_the_host(
    fresh: CudaRunner, plain: Model, replayed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = runner_module.choose_tokens
    monkeypatch.setattr(runner_module, "choose_tokens", lambda *args: (right(*args) + 1).to(torch.int32))
    fresh.resize_kv(replayed.capacity.pages)

    fresh.warm_up()

    assert fresh.graphs.off is None
    assert fresh.proofs["sampling"].startswith("off:")
    request = request_for(plain, *QUESTION, max_tokens=12)
    assert Steps(replayed).run(request) == Steps(plain).run(request)
