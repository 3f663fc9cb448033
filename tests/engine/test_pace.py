"""New work is measured out so that running answers keep their pace."""

from __future__ import annotations

from api.engine.pace import IDLE_STEP_S, LEAST_TOKENS, MIN_DEADLINE_S, PATIENCE, Pace


def taught(decode_s: float = 0.05, token_s: float = 0.003) -> Pace:
    pace = Pace(max_chunk_tokens=512)
    for _ in range(50):
        pace.saw_batch(4, 0, decode_s)
        pace.saw_batch(0, 100, 100 * token_s)
    return pace


def test_before_anything_is_known_chunks_are_whole() -> None:
    assert Pace(512).chunk_tokens(0) == 512


def test_running_answers_slow_down_by_a_known_factor() -> None:
    tokens = taught().chunk_tokens(decoding=4)

    assert 0.05 + tokens * 0.003 <= PATIENCE * 0.05 < 0.05 + (tokens + 2) * 0.003


def test_with_nobody_waiting_a_chunk_may_be_longer() -> None:
    assert taught().chunk_tokens(decoding=0) == int(IDLE_STEP_S / 0.003)


def test_time_spent_on_a_picture_is_taken_from_the_prompt() -> None:
    pace = taught(token_s=0.001)

    assert abs(pace.chunk_tokens(4, spent_s=0.03) - (pace.chunk_tokens(4) - 30)) <= 1


def test_a_busy_engine_still_reads_prompts() -> None:
    assert taught(decode_s=0.001).chunk_tokens(decoding=4, spent_s=5.0) == LEAST_TOKENS


def test_a_larger_batch_does_not_stretch_everybodys_patience() -> None:
    pace = taught(decode_s=0.05)
    for _ in range(50):
        pace.saw_batch(16, 0, 0.1)

    assert pace.slice_s(16) < (PATIENCE - 1) * 0.1


def test_too_little_memory_shrinks_chunks_first_then_batches() -> None:
    pace = taught()

    pace.ran_out_of_memory(rows=8, tokens=400)
    assert (pace.max_chunk_tokens, pace.max_rows) == (200, float("inf"))
    pace.ran_out_of_memory(rows=8, tokens=0)
    assert pace.max_rows == 4


def test_a_step_is_called_stuck_only_after_much_longer_than_expected() -> None:
    assert taught().deadline_s(4, 100) == MIN_DEADLINE_S
    assert taught(decode_s=10.0).deadline_s(4, 0) > 100
