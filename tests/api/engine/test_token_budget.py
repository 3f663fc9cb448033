"""New work is measured out so that running answers keep their pace."""

from __future__ import annotations

from api.engine.token_budget import (
    FREE_ROWS,
    IDLE_STEP_S,
    MAX_STEP_STRETCH,
    MIN_CHUNK_TOKENS,
    MIN_DEADLINE_S,
    TokenBudget,
)


def taught(base_s: float = 0.046, row_s: float = 0.001) -> TokenBudget:
    pace = TokenBudget(max_chunk_tokens=512)
    for _ in range(50):
        for decoding, tokens in ((4, 0), (4, FREE_ROWS - 4), (0, 100), (4, 30)):
            rows = decoding + max(tokens - (FREE_ROWS - decoding), 0)
            pace.record_batch(decoding, tokens, base_s + row_s * rows)
    return pace


def test_before_anything_is_known_chunks_are_whole() -> None:
    assert TokenBudget(512).chunk_tokens(0) == 512


def test_running_answers_slow_down_by_a_known_factor() -> None:
    tokens = taught().chunk_tokens(decoding=4) - (FREE_ROWS - 4)

    assert 0.050 + tokens * 0.001 <= MAX_STEP_STRETCH * 0.047 < 0.050 + (tokens + 2) * 0.001


def test_with_nobody_waiting_a_chunk_may_be_longer() -> None:
    assert abs(taught(row_s=0.003).chunk_tokens(decoding=0) - FREE_ROWS - (IDLE_STEP_S - 0.046) / 0.003) <= 1


def test_time_spent_on_a_picture_is_taken_from_the_prompt() -> None:
    pace = taught()

    assert abs(pace.chunk_tokens(4, spent_s=0.03) - (pace.chunk_tokens(4) - 30)) <= 1


def test_after_a_picture_as_many_prompt_tokens_are_read_as_cost_nothing() -> None:
    assert taught().chunk_tokens(4, spent_s=5.0) == FREE_ROWS - 4
    assert taught().chunk_tokens(FREE_ROWS, spent_s=5.0) == 0


def test_the_first_pass_may_be_of_very_few_tokens() -> None:
    pace = TokenBudget(512)
    pace.record_batch(0, 1, 0.05)

    assert pace.chunk_tokens(1) >= MIN_CHUNK_TOKENS


def test_a_busy_engine_still_reads_prompts() -> None:
    assert taught(base_s=0.001, row_s=0.01).chunk_tokens(decoding=4) == MIN_CHUNK_TOKENS


def test_a_larger_batch_does_not_stretch_everybodys_patience() -> None:
    assert taught(row_s=0.004).slice_s(16) < (MAX_STEP_STRETCH - 1) * (0.046 + 16 * 0.004)


def test_what_a_row_costs_is_not_learnt_from_passes_of_like_size() -> None:
    pace = taught()
    expected = pace.chunk_tokens(4)
    for number in range(200):
        pace.record_batch(4 + number % 2, 0, 0.050 + 0.004 * (number % 3))  # noise

    assert abs(pace.chunk_tokens(4) - expected) < 0.2 * expected


def test_one_disturbed_step_changes_little() -> None:
    pace = taught()
    expected = pace.chunk_tokens(4)
    pace.record_batch(4, 0, 5.0)

    assert abs(pace.chunk_tokens(4) - expected) < 0.5 * expected


def test_too_little_memory_shrinks_chunks_first_then_batches() -> None:
    pace = taught()

    pace.ran_out_of_memory(rows=8, tokens=400)
    assert (pace.max_chunk_tokens, pace.max_rows) == (200, float("inf"))
    pace.ran_out_of_memory(rows=8, tokens=0)
    assert pace.max_rows == 4


def test_a_step_is_called_stuck_only_after_much_longer_than_expected() -> None:
    assert taught().deadline_s(4, 100) == MIN_DEADLINE_S
    assert taught(base_s=10.0).deadline_s(4, 0) > 100
