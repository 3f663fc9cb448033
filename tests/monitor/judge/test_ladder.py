"""The rungs of a cure: the cheapest first, each once, and a person at the end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from monitor.judge import ladder
from monitor.judge.ladder import REMEMBERED_S, Ladder, Step
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict

CORRUPT = Verdict("api", "corrupt", "fingerprint_differs", "It computes wrongly.", "计算有误。", cure=True)
RESTART = Decision("restart", "corrupt: fingerprint_differs")
NOW = 1_800_000_000.0


def taken(*rungs: str, outcome: str = "done", seen: int | None = None, at: float = NOW - 60) -> Ladder:
    return Ladder(tuple(Step(rung, at, outcome, 1.0) for rung in rungs), seen)


@pytest.mark.parametrize(
    ("before", "kind"),
    [((), "drop-caches"), (("drop-caches",), "reload-weights"), (("drop-caches", "reload-weights"), "restart"), (("reload-weights",), "drop-caches")],
)
def test_each_run_takes_the_next_rung(before, kind):
    decision = ladder.decide(RESTART, CORRUPT, taken(*before), NOW)

    assert decision.kind == kind
    assert "fingerprint_differs" in decision.reason


def test_a_person_is_told_once_when_no_rung_is_left():
    climbed = taken("drop-caches", "reload-weights", "restart", outcome="failed")

    first = ladder.decide(RESTART, CORRUPT, climbed, NOW)
    again = ladder.decide(RESTART, CORRUPT, ladder.took(climbed, Step("person", NOW, "done"), None), NOW + 60)

    assert (first.kind, first.tells) == ("hold", True)
    assert (again.kind, again.tells) == ("hold", False)
    assert "dropping the caches (failed), reloading the weights (failed), restarting the process (failed)" in first.reason
    assert "a person is needed" in first.reason


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict("api", "dead", "process_gone", "gone", "没了", cure=True), Verdict("api", "zombie", "frozen", "z", "z", cure=True),
        Verdict("api", "wedged", "no_progress", "w", "w", cure=True), Verdict("api", "broken", "text_cut", "c", "c", cure=True),
        Verdict("api", "broken", "loading_stands_still", "l", "l", cure=True), Verdict("page", "broken", "page_script", "p", "p", cure=True),
    ],
)  # fmt: skip
def test_what_only_a_restart_cures_is_restarted_at_once(verdict):
    assert ladder.decide(RESTART, verdict, Ladder(), NOW) == RESTART


@pytest.mark.parametrize("rule", ["picture_wrong", "text_wrong", "accuracy_fell"])
def test_wrong_answers_climb_too(rule):
    wrong = replace(CORRUPT, word="broken", rule=rule)

    assert ladder.decide(RESTART, wrong, Ladder(), NOW).kind == "drop-caches"
    assert not ladder.applies(replace(wrong, cure=False)), "without a baseline nothing is done"


@pytest.mark.parametrize("limited", [Decision("hold", "maintenance"), Decision("none", ""), Decision("hold", "full", opens=True)])
def test_holds_and_limits_stay_as_they_are(limited):
    assert ladder.decide(limited, CORRUPT, Ladder(), NOW) == limited


def test_shadow_mode_names_the_rung_and_takes_none():
    decision = ladder.decide(Decision("shadow", "corrupt"), CORRUPT, Ladder(), NOW)

    assert decision.kind == "shadow" and "dropping the caches" in decision.reason


def test_a_count_of_ten_minutes_is_no_new_fault():
    """The count that raised the verdict stays for ten minutes after the rung has cured it."""
    counted = replace(CORRUPT, rule="nonfinite", facts={"nonfinite_total": 2})

    waits = ladder.decide(RESTART, counted, taken("drop-caches", seen=2), NOW)
    rose = ladder.decide(RESTART, replace(counted, facts={"nonfinite_total": 3}), taken("drop-caches", seen=2), NOW)
    failed = ladder.decide(RESTART, counted, taken("drop-caches", outcome="failed", seen=2), NOW)

    assert waits.kind == "hold" and "nothing new" in waits.reason
    assert rose.kind == failed.kind == "reload-weights"


def test_a_fault_that_comes_back_within_hours_gets_the_next_rung():
    assert ladder.decide(RESTART, CORRUPT, taken("drop-caches", at=NOW - REMEMBERED_S + 60), NOW).kind == "reload-weights"
    assert ladder.decide(RESTART, CORRUPT, taken("drop-caches", at=NOW - REMEMBERED_S - 60), NOW).kind == "drop-caches"


def test_the_position_survives_the_store():
    climbed = taken("drop-caches", "reload-weights", seen=4)

    assert ladder.from_dict(json.loads(json.dumps(ladder.to_dict(climbed)))) == climbed
    assert ladder.from_dict({}) == Ladder()
