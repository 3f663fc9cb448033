"""An engine behind the API: what is its fault is called so, and the API in front of it is not restarted for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from monitor.judge.api_rules import judge_api
from monitor.judge.engine_rules import judge_behind
from monitor.judge.evidence import Answer, ApiEvidence, EngineEvidence, HealthReply, Process
from monitor.judge.verdict import Limits, Verdict

RUNS = Process("runs", 10, 500.0, "ours")
IDLE = HealthReply("answered", 0.01, 200, "idle", pending=0, steps=3)
WELL = HealthReply("answered", 0.01, 200, "idle", "", 3, 0, 0.0)
RIGHT = (Answer("text", "right"), Answer("picture", "right"))
LOST = (Answer("text", "silent", 10.0, detail="no answer within 10 s"),)
WAITS = HealthReply("answered", 0.01, 503, "loading", reason="the engine behind at http://e is not ready: refused")


def verdict(engine: EngineEvidence | None, first: HealthReply = IDLE, answers: tuple[Answer, ...] = RIGHT, **more: Any) -> Verdict:
    evidence = ApiEvidence("http://front", RUNS, first=first, answers=answers, engine=engine, **more)
    return judge_behind(judge_api(evidence, Limits()), evidence, Limits())


def engine(reply: HealthReply = WELL, process: Process = RUNS, ours: bool = True) -> EngineEvidence:
    return EngineEvidence("http://e", reply, process, ours)


def test_a_good_answer_through_the_front_is_healthy() -> None:
    assert verdict(engine()).word == "healthy"


CASES = {
    "its process is gone": (engine(HealthReply("refused"), replace(RUNS, state="gone")), WAITS, (), "dead", "engine_gone"),
    "its process is gone and nobody has asked yet": (engine(HealthReply("refused"), replace(RUNS, state="gone")), IDLE, RIGHT, "dead", "engine_gone"),
    "nothing listens": (engine(HealthReply("refused"), Process(), False), WAITS, (), "dead", "engine_unreachable"),
    "it has just been started": (engine(HealthReply("refused")), WAITS, (), "starting", "engine_starting"),
    "it never opens its port": (engine(HealthReply("refused"), replace(RUNS, age_s=2000.0)), WAITS, (), "dead", "engine_unreachable"),
    "it says that it is dead": (engine(HealthReply("answered", 0.0, 503, "dead")), WAITS, (), "dead", "engine_behind_dead"),
    "it loads": (engine(HealthReply("answered", 0.0, 503, "loading")), WAITS, (), "starting", "engine_loading"),
    "it has just become ready": (engine(), replace(WAITS, reason="not ready: it answers HTTP 503 (loading)"), (), "starting", "engine_loading"),
    "it lists no model": (engine(), replace(WAITS, reason="GET /v1/models answers HTTP 200 without a model"), (), "broken", "engine_not_ready"),
    "it does not answer": (engine(HealthReply("silent", detail="2 s")), WAITS, (), "wedged", "engine_stalled"),
    "its counters stand still": (engine(replace(WELL, state="busy", pending=2, no_progress_s=130.0)), IDLE, LOST, "wedged", "engine_stalled"),
    "it says 200 and answers nothing": (engine(), IDLE, LOST, "wedged", "engine_stalled"),
    "it is another API that is stalled": (engine(HealthReply("answered", 0.0, 503, "stalled")), IDLE, LOST, "wedged", "engine_stalled"),
    "it answers with an error": (engine(), IDLE, (Answer("text", "rejected", status=500),), "broken", "text_rejected"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_the_fault_of_the_engine_is_called_so(name: str) -> None:
    behind, first, answers, word, rule = CASES[name]

    found = verdict(behind, first, answers)

    assert (found.word, found.rule) == (word, rule), found
    assert found.part == "engine" or word == "starting"


def test_its_key_is_refused() -> None:
    first = replace(WAITS, reason="the engine behind at http://e is not ready: it refuses GLM_ENGINE_KEY")

    assert verdict(engine(), first, ()).rule == "engine_key_refused"


def test_what_is_the_fault_of_the_front_stays_its_own() -> None:
    gone = ApiEvidence("http://front", replace(RUNS, state="gone"), first=HealthReply("refused"), engine=engine(HealthReply("refused")))
    found = judge_behind(judge_api(gone, Limits()), gone, Limits())

    assert (found.rule, found.part) == ("process_gone", "")


def test_a_busy_engine_that_moves_is_left_alone() -> None:
    busy = replace(IDLE, state="busy", pending=3, steps=5)
    behind = engine(replace(WELL, state="busy", pending=3, no_progress_s=4.0))

    assert verdict(behind, busy, LOST, last=replace(busy, steps=9)).word == "busy"


def test_an_engine_that_was_asked_and_counts_no_request_hangs_whatever_the_front_still_waits_for() -> None:
    """The question of the checker itself is under way until the front has noticed that it has left."""
    waits = replace(IDLE, state="busy", pending=1, no_progress_s=9.0)

    assert verdict(engine(), waits, LOST, last=waits).rule == "engine_stalled"
    assert verdict(engine(replace(WELL, pending=1, state="busy", no_progress_s=9.0)), waits, LOST, last=waits).rule == "busy"
    uncounted = engine(replace(WELL, pending=None, no_progress_s=None))
    assert verdict(uncounted, waits, LOST, last=waits).rule == "busy"
    assert verdict(uncounted, waits, LOST, last=replace(waits, unanswered_s=130.0)).rule == "engine_stalled"


def test_evidence_of_an_engine_can_be_recorded_and_replayed() -> None:
    evidence = ApiEvidence("http://front", RUNS, first=IDLE, engine=engine())

    assert ApiEvidence.from_dict(evidence.to_dict()) == evidence
