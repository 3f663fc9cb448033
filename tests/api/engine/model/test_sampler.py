"""Sampling: greedy, truncated, penalised, constrained, with logprobs, and the same alone or in any batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from api.engine.loaded_model import SampledToken
from api.engine.model.sampler import Sampler
from api.engine.request import Request, SamplingParams
from api.engine.sequence import Sequence
from api.engine.text.output import GrammarViolation

LOGITS = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0])
SIZE = len(LOGITS)


class Output:
    """The part of OutputState that the sampler uses."""

    def __init__(
        self, forced: int | None = None, barred: tuple[int, ...] = (), allowed: list[int] | None = None
    ) -> None:
        self.forced, self.barred_ids = forced, frozenset(barred)
        self.grammar = None if allowed is None else self
        self._allowed = allowed or []

    def allowed(self) -> Any:
        return np.array([sum(1 << token for token in self._allowed)], dtype=np.int32)


def sequence(slot: int = 0, prompt: tuple[int, ...] = (), output: Output | None = None, **sampling) -> Sequence:
    one = Sequence(Request("r", prompt, SamplingParams(**{"max_tokens": 1, **sampling})), lambda event: None)
    one.slot, one.output = slot, output
    return one


def sample_tokens(count: int = 200, logits: torch.Tensor = LOGITS, **options) -> list[int]:
    sampler, one = Sampler(1, len(logits), torch.device("cpu")), sequence(**options)
    sampler.begin(one)
    for _ in range(count):
        one.append(sampler.sample(logits[None], [one])[0].token)
    return one.output_ids


def sample_batch(logits: torch.Tensor, *sequences: Sequence) -> list[SampledToken]:
    sampler = Sampler(len(sequences), logits.shape[-1], torch.device("cpu"))
    for one in sequences:
        sampler.begin(one)
    return sampler.sample(logits, sequences)


def test_temperature_zero_is_greedy() -> None:
    assert set(sample_tokens(temperature=0.0)) == {1}


def test_top_k_keeps_the_k_most_probable() -> None:
    assert set(sample_tokens(temperature=5.0, top_k=2, seed=1)) == {1, 2}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    best, second = LOGITS.softmax(-1)[1], LOGITS.softmax(-1)[2]

    assert set(sample_tokens(temperature=1.0, top_p=float(best) - 0.01, seed=1)) == {1}
    assert set(sample_tokens(temperature=1.0, top_p=float(best + second) - 0.01, seed=1)) == {1, 2}


def test_top_p_applies_after_top_k() -> None:
    probabilities = LOGITS[[1, 2]].softmax(-1)

    assert set(sample_tokens(temperature=1.0, top_k=2, top_p=float(probabilities[0]) + 0.01, seed=1)) == {1, 2}
    assert set(sample_tokens(temperature=1.0, top_k=2, top_p=float(probabilities[0]) - 0.01, seed=1)) == {1}


def test_top_p_zero_keeps_one() -> None:
    assert set(sample_tokens(temperature=1.0, top_p=0.0, seed=1)) == {1}


def test_min_p_drops_tokens_much_less_probable_than_the_best() -> None:
    ratio = float((LOGITS[0] - LOGITS[1]).exp())

    assert set(sample_tokens(2000, temperature=1.0, min_p=ratio + 0.01, seed=1)) == {1, 2}
    assert set(sample_tokens(2000, temperature=1.0, min_p=ratio - 0.01, seed=1)) == {0, 1, 2}


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.999999}, {"top_k": 5}], ids=["all", "sorted", "few"])
def test_tokens_are_sampled_by_their_probabilities(cut: dict) -> None:
    rows, steps = 200, 100
    count = rows * steps
    sampler = Sampler(rows, SIZE, torch.device("cpu"))
    batch = [sequence(slot, temperature=1.5, seed=slot, **cut) for slot in range(rows)]
    for one in batch:
        sampler.begin(one)
    expected = (LOGITS / 1.5).softmax(-1)

    seen: Counter[int] = Counter()
    for _ in range(steps):
        for one, sampled in zip(batch, sampler.sample(LOGITS.repeat(rows, 1), batch), strict=True):
            one.append(sampled.token)
            seen[sampled.token] += 1

    for token, p in enumerate(expected.tolist()):
        assert abs(seen[token] / count - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1e-4


def test_a_seed_determines_the_tokens() -> None:
    options = {"temperature": 3.0}

    assert sample_tokens(seed=7, **options) == sample_tokens(seed=7, **options)
    assert sample_tokens(seed=7, **options) != sample_tokens(seed=8, **options)
    assert sample_tokens(**options) != sample_tokens(**options)


def test_a_negative_seed_is_valid() -> None:
    assert sample_tokens(seed=-5, temperature=3.0) == sample_tokens(seed=-5, temperature=3.0)


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch() -> None:
    torch.manual_seed(1)
    logits = torch.randn(12, 3000) * 3
    kinds = [{}, {"top_k": 3}, {"top_k": 50, "top_p": 0.8}, {"top_p": 0.7}, {"min_p": 0.05}, {"temperature": 0.0}]
    made = [sequence(slot, temperature=kinds[slot % 6].get("temperature", 1.2), seed=slot,
                     **{k: v for k, v in kinds[slot % 6].items() if k != "temperature"}) for slot in range(12)]  # fmt: skip

    together = [sampled.token for sampled in sample_batch(logits, *made)]
    alone = []
    for row, one in enumerate(made):
        one.slot = 0
        alone.append(sample_batch(logits[row : row + 1], one)[0].token)

    assert together == alone


def test_a_preempted_sequence_continues_its_random_numbers() -> None:
    expected = sample_tokens(40, temperature=3.0, seed=7)
    sampler, one = Sampler(2, SIZE, torch.device("cpu")), sequence(temperature=3.0, seed=7)
    for turn in range(40):
        if turn % 10 == 0:
            one.slot = turn // 10 % 2
            sampler.begin(one)
        one.append(sampler.sample(LOGITS[None], [one])[0].token)

    assert one.output_ids == expected


def test_the_repetition_penalty_applies_to_prompt_and_output() -> None:
    assert sample_tokens(3, temperature=0.0, repetition_penalty=2.0) == [1, 2, 1]
    assert sample_tokens(1, prompt=(1,), temperature=0.0, repetition_penalty=2.0) == [2]


def test_presence_and_frequency_penalties_apply_to_the_output_only() -> None:
    assert sample_tokens(1, prompt=(1, 1), presence_penalty=2.0) == [1]
    assert sample_tokens(3, presence_penalty=1.0) == [1, 2, 1]
    assert sample_tokens(5, frequency_penalty=0.4) == [1, 1, 2, 1, 2]


def test_tokens_that_were_not_sampled_count_too() -> None:
    """As those that a grammar forces: several are appended at once."""
    sampler, one = Sampler(1, SIZE, torch.device("cpu")), sequence(frequency_penalty=0.4)
    sampler.begin(one)
    one.append(sampler.sample(LOGITS[None], [one])[0].token)
    for token in (1, 2, 1):
        one.append(token)

    assert sampler.sample(LOGITS[None], [one])[0].token == 2  # 3 - 3 * 0.4 against 2.5 - 0.4
    sampler.begin(one)
    assert sampler.sample(LOGITS[None], [one])[0].token == 2


def test_a_step_that_is_repeated_counts_its_tokens_once() -> None:
    sampler, one = Sampler(1, SIZE, torch.device("cpu")), sequence(frequency_penalty=0.4, presence_penalty=-0.1)
    sampler.begin(one)
    for _ in range(5):
        again = [sampler.sample(LOGITS[None], [one])[0].token for _ in range(3)]
        assert len(set(again)) == 1
        one.append(again[0])

    assert one.output_ids == sample_tokens(5, frequency_penalty=0.4, presence_penalty=-0.1)


def test_inputs_that_the_device_counts_are_counted_once() -> None:
    """Decoding steps one after another, a step ahead, one that is repeated, and one after a token that was forced."""
    sampler, one = Sampler(2, SIZE, torch.device("cpu")), sequence(1, prompt=(4,), repetition_penalty=1.5)
    sampler.begin(one)

    def step(token: int, ahead: int = 0) -> None:
        sampler.leave_input(one, ahead)
        sampler.count_inputs(torch.tensor([1], dtype=torch.int32), torch.tensor([token], dtype=torch.int32))

    one.append(3)
    step(3)
    step(2, ahead=1)
    one.append(2)
    assert sampler.counts[1].tolist() == [0, 0, 1, 1, 0]
    step(2)
    assert sampler.counts[1].tolist() == [0, 0, 1, 1, 0]
    one.append(0)
    one.append(3)
    step(3)

    assert sampler.counts[1].tolist() == [1, 0, 1, 2, 0]
    assert sampler.seen[1].tolist() == [True, False, True, True, True]
    assert not sampler.counts[0].any()


def test_a_bias_is_added_to_the_logits() -> None:
    assert sample_tokens(1, logit_bias=((3, 100.0), (1, -100.0))) == [3]


def test_a_token_may_be_barred_or_forced_for_one_row_only() -> None:
    rows = LOGITS.repeat(3, 1)

    sampled = sample_batch(rows, sequence(0), sequence(1, output=Output(barred=(1, 2))), sequence(2, output=Output(forced=4)))

    assert [one.token for one in sampled] == [1, 0, 4]


def test_a_grammar_applies_to_its_own_row() -> None:
    sampled = sample_batch(LOGITS.repeat(2, 1), sequence(0, output=Output(allowed=[0, 3])), sequence(1))

    assert [one.token for one in sampled] == [0, 1]


def test_a_grammar_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(GrammarViolation):
        sample_batch(LOGITS[None], sequence(output=Output(allowed=[])))


def test_a_grammar_shorter_than_the_logits_forbids_the_rest() -> None:
    logits = torch.zeros(1, 70)
    logits[0, 60] = 5.0

    assert sample_batch(logits, sequence(output=Output(allowed=[2])))[0].token == 2


def test_logprobs_are_those_of_the_raw_logits() -> None:
    two = sequence(0, logprobs=2, logit_bias=((4, 100.0),))
    none = sequence(1, logprobs=0)

    first, second, third = sample_batch(LOGITS.repeat(3, 1), two, none, sequence(2))

    expected = LOGITS.log_softmax(-1)
    assert first.token == 4 and first.logprob is not None
    assert first.logprob.logprob == pytest.approx(float(expected[4]))
    assert [token for token, _ in first.logprob.top] == [1, 2]
    assert first.logprob.top[0][1] == pytest.approx(float(expected[1]))
    assert second.logprob is not None and second.logprob.top == ()
    assert third.logprob is None


def test_a_reused_slot_starts_clean() -> None:
    sampler = Sampler(1, SIZE, torch.device("cpu"))
    for _ in range(2):
        one = sequence(repetition_penalty=2.0, frequency_penalty=9.0)
        sampler.begin(one)
        assert sampler.sample(LOGITS[None], [one])[0].token == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"logprobs": 2}])
def test_a_row_that_is_not_finite_is_marked_and_changes_no_other(value: float, options: dict) -> None:
    rows = LOGITS.repeat(3, 1)
    expected = sample_batch(rows, *(sequence(slot, seed=slot, **options) for slot in range(3)))
    broken = rows.clone()
    broken[1, 3] = value

    sampled = sample_batch(broken, *(sequence(slot, seed=slot, **options) for slot in range(3)))

    assert [one.finite for one in sampled] == [True, False, True]
    assert sampled[::2] == expected[::2]
