"""The engine's pace: what is counted as decoding, as prefill and as vision, and in which seconds."""

from __future__ import annotations

import pytest
from driving import WAIT_S, read
from test_engine_batches import about

from api.engine.pace import PaceCounters

NOTHING = {"1": [0, 0], "2": [0, 0], "3-4": [0, 0], "5-8": [0, 0], "9-16": [0, 0], "17-": [0, 0]}


@pytest.mark.parametrize(
    ("rows", "name"),
    [(1, "1"), (2, "2"), (3, "3-4"), (4, "3-4"), (5, "5-8"), (8, "5-8"), (9, "9-16"), (16, "9-16"), (17, "17-"), (99, "17-")],
)
def test_a_step_is_counted_by_its_rows(rows: int, name: str) -> None:
    pace = PaceCounters()

    pace.computed(rows, 0, 0.25)
    pace.computed(rows, 0, 0.5)

    assert pace.totals() == {"decode": {**NOTHING, name: [2, 0.75]}, "prefill": [0, 0], "vision": [0, 0]}


def test_a_step_with_a_prompt_in_it_says_nothing_about_decoding() -> None:
    pace = PaceCounters()

    pace.computed(3, 40, 0.25)

    assert pace.totals() == {"decode": NOTHING, "prefill": [40, 0.25], "vision": [0, 0]}


def test_an_answer_is_one_prefill_and_a_step_for_each_further_token(drive) -> None:
    driver = drive(answer=lambda p, i: "x" * 20, token_s=0.01)
    assert driver.engine.pace.totals()["decode"] == NOTHING
    read(driver.ask("four"))

    totals = driver.engine.pace.totals()

    tokens, prefill_s = totals["prefill"]
    steps, decode_s = totals["decode"].pop("1")
    assert (tokens, steps) == (4, 20) and totals["vision"] == [0, 0], "the first token comes with the prompt"
    assert 0.01 <= prefill_s < 5 and 20 * 0.01 <= decode_s < 20
    assert all(pair == [0, 0] for pair in totals["decode"].values())


def test_requests_that_share_steps_are_rows_of_them(drive) -> None:
    driver = drive(slots=4, answer=lambda p, i: "x" * 50, queue_size=8)
    streams = [driver.ask("HANG", "0")]
    driver.runner.hanging.wait(WAIT_S)
    streams += [driver.ask("q", str(number)) for number in range(1, 4)]
    driver.runner.release.set()
    for stream in streams:
        read(stream)

    totals = driver.engine.pace.totals()

    assert totals["decode"]["3-4"][0] > 40 and totals["prefill"][0] == len("HANG") + 3


def test_an_image_in_slices_is_counted_when_it_is_complete(drive) -> None:
    driver = drive(answer=lambda p, i: "fine")
    driver.runner.slices = 5
    read(about(driver, (1, 2, 3), "first"))
    read(about(driver, (1, 2, 3), "second"))  # from the cache

    patches, seconds = driver.engine.pace.totals()["vision"]

    assert patches == 16 and seconds > 0, "56 x 56 pixels are 4 x 4 patches"


def test_what_fails_is_no_measure(drive) -> None:
    driver = drive()

    read(driver.ask("FAIL"))

    assert driver.engine.pace.totals() == {"decode": NOTHING, "prefill": [0, 0], "vision": [0, 0]}
