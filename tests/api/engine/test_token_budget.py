"""The token budget keeps the pace of decoding requests."""

from __future__ import annotations

from api.engine.token_budget import (
    FREE_ROWS,
    IDLE_STEP_S,
    MAX_STEP_STRETCH,
    MIN_CHUNK_TOKENS,
    MIN_DEADLINE_S,
    TokenBudget,
)


def trained(base_s: float = 0.046, row_s: float = 0.001) -> TokenBudget:
    budget = TokenBudget(max_chunk_tokens=512)
    for _ in range(50):
        for decoding, tokens in ((4, 0), (4, FREE_ROWS - 4), (0, 100), (4, 30)):
            rows = decoding + max(tokens - (FREE_ROWS - decoding), 0)
            budget.record_batch(decoding, tokens, base_s + row_s * rows)
    return budget


def test_without_measurements_chunks_are_as_large_as_possible() -> None:
    assert TokenBudget(512).chunk_tokens(0) == 512


def test_running_answers_slow_down_by_a_known_factor() -> None:
    tokens = trained().chunk_tokens(decoding=4) - (FREE_ROWS - 4)

    assert 0.050 + tokens * 0.001 <= MAX_STEP_STRETCH * 0.047 < 0.050 + (tokens + 2) * 0.001


def test_chunks_are_larger_while_no_request_decodes() -> None:
    assert abs(trained(row_s=0.003).chunk_tokens(decoding=0) - FREE_ROWS - (IDLE_STEP_S - 0.046) / 0.003) <= 1


def test_time_spent_on_an_image_reduces_the_chunk() -> None:
    budget = trained()

    assert abs(budget.chunk_tokens(4, spent_s=0.03) - (budget.chunk_tokens(4) - 30)) <= 1


def test_after_an_image_a_chunk_has_the_rows_that_cost_nothing() -> None:
    assert trained().chunk_tokens(4, spent_s=5.0) == FREE_ROWS - 4
    assert trained().chunk_tokens(FREE_ROWS, spent_s=5.0) == 0


def test_the_first_pass_may_be_of_very_few_tokens() -> None:
    budget = TokenBudget(512)
    budget.record_batch(0, 1, 0.05)

    assert budget.chunk_tokens(1) >= MIN_CHUNK_TOKENS


def test_a_busy_engine_still_prefills() -> None:
    assert trained(base_s=0.001, row_s=0.01).chunk_tokens(decoding=4) == MIN_CHUNK_TOKENS


def test_the_limit_does_not_grow_with_the_batch() -> None:
    assert trained(row_s=0.004).slice_s(16) < (MAX_STEP_STRETCH - 1) * (0.046 + 16 * 0.004)


def test_the_cost_of_a_row_is_not_learned_from_passes_of_similar_size() -> None:
    budget = trained()
    expected = budget.chunk_tokens(4)
    for number in range(200):
        budget.record_batch(4 + number % 2, 0, 0.050 + 0.004 * (number % 3))  # noise

    assert abs(budget.chunk_tokens(4) - expected) < 0.2 * expected


def test_one_disturbed_step_changes_little() -> None:
    budget = trained()
    expected = budget.chunk_tokens(4)
    budget.record_batch(4, 0, 5.0)

    assert abs(budget.chunk_tokens(4) - expected) < 0.5 * expected


def test_too_little_memory_shrinks_chunks_first_then_batches() -> None:
    budget = trained()

    budget.ran_out_of_memory(rows=8, tokens=400)
    assert (budget.max_chunk_tokens, budget.max_rows) == (200, float("inf"))
    budget.ran_out_of_memory(rows=8, tokens=0)
    assert budget.max_rows == 4


def test_a_step_is_stuck_only_after_much_longer_than_expected() -> None:
    assert trained().deadline_s(4, 100) == MIN_DEADLINE_S
    assert trained(base_s=10.0).deadline_s(4, 0) > 100
