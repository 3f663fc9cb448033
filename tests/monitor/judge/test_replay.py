"""Thousands of traces through verdict, history and limiter with a simulated clock."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from traces import FULL, GONE, IDLE, RIGHT, RUNS, WEDGED, Replay, alive, api, busy, zombie

from monitor.judge import history
from monitor.judge.evidence import (
    AccuracyEvidence,
    Answer,
    ApiEvidence,
    Corruption,
    Fall,
    HealthReply,
    SelfReport,
)
from monitor.judge.verdict import Limits

TRACES, RUNS_EACH = 10_000, 30


def test_ten_thousand_traces_of_a_working_service_restart_nothing() -> None:
    rng = random.Random(20_26)
    for number in range(TRACES):
        replay = Replay()
        for _ in range(RUNS_EACH):
            jump_s = rng.choice([0, 0, 0, 0, 0, 0, 0, rng.uniform(-90000, 90000)])
            replay.run(alive(rng), after_s=rng.choice([60, 60, 60, 61, 1, 3600]), jump_s=jump_s)
        assert replay.restarts == 0, f"trace {number}"


def test_the_same_traces_with_one_real_fault_are_cured_within_three_runs() -> None:
    """The service works before the fault."""
    rng = random.Random(7)
    for number in range(1000):
        replay = Replay()
        for _ in range(rng.randrange(1, 10)):
            replay.run(alive(rng))
        fault = rng.choice([GONE, WEDGED, zombie(70)])
        for _ in range(3):
            if replay.run(fault).kind == "restart":
                break
        assert replay.restarts == 1, f"trace {number}: {replay.decisions[-3:]} {replay.verdicts[-3:]}"


def test_alternating_bad_and_good_runs_restart_nothing() -> None:
    replay = Replay()
    lost = api(answers=(Answer("text", "cut", 1.0, 200), Answer("picture", "cut", 1.0, 200)), last=IDLE)
    for number in range(500):
        replay.run(lost if number % 2 else api())

    assert replay.restarts == 0


def test_missing_runs_do_not_add_up() -> None:
    replay = Replay()
    for _ in range(50):
        replay.run(zombie(70), after_s=7200)

    assert replay.restarts == 0, "runs that are hours apart are not consecutive"


def test_runs_within_a_second_count_as_one() -> None:
    replay = Replay()
    for _ in range(10):
        replay.run(zombie(70), after_s=1)

    assert replay.restarts == 0


def test_a_clock_jump_is_not_evidence() -> None:
    replay = Replay()
    replay.run(api())
    assert replay.run(GONE, jump_s=4000).kind == "none"
    assert replay.verdicts[-1].word == "unknown"
    assert replay.run(GONE).kind == "restart"


def test_five_hundred_flaps_are_one_incident_and_two_messages() -> None:
    replay = Replay(mode="shadow")
    for _ in range(500):
        replay.run(GONE)
        replay.run(api())
    for _ in range(15):
        replay.run(api())

    opened = [change for change in replay.changes if change.kind == "opened"]
    assert replay.messages == 2 and len(opened) == 1
    closed = replay.changes[-1]
    assert closed.kind == "closed" and closed.incident is not None and closed.incident.flaps == 499


def test_a_restart_resets_the_count() -> None:
    replay = Replay()
    replay.run(zombie(70))
    assert replay.run(zombie(130)).kind == "restart"

    slow_boot = zombie(70)
    assert replay.run(slow_boot).kind == "none", "one bad run after a restart is not two"


def test_a_crash_loop_ends_in_an_open_circuit_and_stays_there() -> None:
    replay = Replay()
    for _ in range(180):
        replay.run(GONE)

    assert replay.restarts == 3, "three in an hour, then a person is needed"
    assert replay.decisions[-1].kind == "hold" and "circuit is open" in replay.decisions[-1].reason
    assert sum(decision.opens for decision in replay.decisions) == 1
    assert replay.messages == 2, "the incident and the circuit"


def test_occasional_crashes_reach_the_daily_limit() -> None:
    replay = Replay()
    for _ in range(12):
        replay.run(GONE)
        for _ in range(60):
            replay.run(api())

    assert replay.restarts == 6


def test_back_off_grows_while_the_service_is_unstable() -> None:
    replay = Replay()
    times = []
    for _ in range(60):
        if replay.run(GONE, after_s=10).kind == "restart":
            times.append(replay.wall)

    waits = [round(b - a) for a, b in itertools.pairwise(times)]
    assert waits == sorted(waits) and waits[0] >= 30 and waits[1] >= 60


def test_restarts_that_do_not_cure_stop() -> None:
    fallen = AccuracyEvidence((Fall("color", 12, 1, 220, 219),), ("color",), 8)
    wrong = api(answers=(RIGHT[0], Answer("picture", "wrong", 3, 200, "red circle", "blue")), last=IDLE, accuracy=fallen)
    replay = Replay()
    for _ in range(40):
        replay.run(wrong)

    assert replay.restarts == 2
    assert "a person is needed" in replay.decisions[-1].reason


def test_loading_beyond_its_deadline_is_restarted_once() -> None:
    late = api(first=HealthReply("answered", 0, 503, "loading"), answers=(), process=replace(RUNS, age_s=1000))
    replay = Replay()
    for _ in range(30):
        replay.run(late)

    assert replay.restarts == 1


def test_a_load_that_stands_still_is_restarted_once() -> None:
    still = api(first=HealthReply("answered", 0, 503, "loading", report=SelfReport(loading_still_s=400.0)), answers=())
    replay = Replay()
    for _ in range(30):
        replay.run(still)

    assert replay.restarts == 1


def test_a_load_that_moves_may_take_a_day() -> None:
    replay = Replay()
    for minute in range(1440):
        moving = HealthReply("answered", 0, 503, "loading", progress=minute / 1440, report=SelfReport(loading_still_s=minute % 290))
        replay.run(api(first=moving, answers=(), process=replace(RUNS, age_s=60.0 * minute)))

    assert replay.restarts == 0 and {verdict.word for verdict in replay.verdicts} == {"starting"}


def test_a_corrupt_engine_is_cured_at_once() -> None:
    seen = api(first=replace(IDLE, report=SelfReport(corrupt=Corruption(fingerprint="differs"))))

    assert Replay().run(seen).kind == "restart"


@pytest.mark.parametrize("hours", [1, 24])
def test_saturation_for_hours_restarts_nothing_and_alerts_nobody(hours: int) -> None:
    replay = Replay()
    for number in range(hours * 60):
        replay.run(api(first=busy(1, number * 50), answers=FULL, last=busy(1, number * 50 + 40)))

    assert replay.restarts == 0 and replay.messages == 0
    assert {verdict.word for verdict in replay.verdicts} == {"busy"}


def test_histories_survive_json() -> None:
    rng = random.Random(3)
    replay = Replay(mode="shadow")
    for _ in range(200):
        replay.run(rng.choice([GONE, WEDGED, api(), zombie(70)]))
        stored = json.loads(json.dumps(history.to_dict(replay.history)))
        assert history.from_dict(stored) == replay.history


@pytest.mark.parametrize("path", sorted(Path(__file__).with_name("recorded").glob("*.json")), ids=lambda p: p.stem)
def test_recorded_traces_decide_as_they_did(path: Path) -> None:
    """Evidence recorded by the drill: verdicts and restarts must be as recorded."""
    trace = json.loads(path.read_text())
    replay = Replay(Limits(**trace["limits"]))
    for step in trace["runs"]:
        replay.run(ApiEvidence.from_dict(step["api"]), after_s=step["after_s"])

    assert [verdict.word for verdict in replay.verdicts] == [step["word"] for step in trace["runs"]]
    assert replay.restarts == trace["restarts"]
