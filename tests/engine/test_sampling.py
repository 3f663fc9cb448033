"""Choosing tokens: greedy, cut, penalised, seeded."""

from __future__ import annotations

import torch

from api.engine.request import Sampling
from api.engine.sampling import Sampler

LOGITS = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0])


def draws(count: int = 200, prompt: tuple[int, ...] = (), **sampling) -> list[int]:
    sampler = Sampler(Sampling(max_tokens=1, **sampling), prompt, len(LOGITS))
    return [sampler.choose(LOGITS) for _ in range(count)]


def test_temperature_zero_takes_the_best() -> None:
    assert set(draws(temperature=0.0)) == {1}


def test_top_k_leaves_only_the_best_k() -> None:
    assert set(draws(temperature=5.0, top_k=2, seed=1)) == {1, 2}


def test_top_p_leaves_the_fewest_that_reach_it() -> None:
    best, second = LOGITS.softmax(-1)[1], LOGITS.softmax(-1)[2]

    assert set(draws(temperature=1.0, top_p=float(best) - 0.01, seed=1)) == {1}
    assert set(draws(temperature=1.0, top_p=float(best + second) - 0.01, seed=1)) == {1, 2}


def test_top_p_zero_still_leaves_one() -> None:
    assert set(draws(temperature=1.0, top_p=0.0, seed=1)) == {1}


def test_without_cuts_every_token_can_come() -> None:
    assert set(draws(2000, temperature=3.0, seed=1)) == {0, 1, 2, 3, 4}


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    options = {"temperature": 3.0}

    assert draws(seed=7, **options) == draws(seed=7, **options)
    assert draws(seed=7, **options) != draws(seed=8, **options)


def test_a_seed_is_not_disturbed_by_the_global_generator() -> None:
    before = draws(temperature=3.0, seed=7)
    torch.manual_seed(99)

    assert draws(temperature=3.0, seed=7) == before


def test_the_penalty_falls_on_tokens_of_the_prompt_and_of_the_answer() -> None:
    assert draws(3, temperature=0.0, repetition_penalty=2.0) == [1, 2, 1]
    assert draws(1, prompt=(1,), temperature=0.0, repetition_penalty=2.0) == [2]
