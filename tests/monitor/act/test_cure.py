"""The ladder of cures, carried out by whole runs against a server that computes wrongly until the right rung."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from pydantic import SecretStr
from stand_in_model import completion

from monitor import check
from monitor.act.cure import Cure
from monitor.judge import api_rules, ladder
from monitor.judge.ladder import Ladder
from monitor.observe.observe import now
from monitor.store.state import CheckerState
from monitor.store.store import Store


class Corrupt:
    """Answers wrongly until `cure` is done. `knows`: the actions of its POST /control."""

    def __init__(self, behaviour, describe, cure: str, knows=("drop-caches", "reload-weights", "fingerprint")) -> None:
        self.behaviour, self.cure, self.knows = behaviour, cure, knows
        self.well = False
        self.actions: list[str] = []
        behaviour.reply = lambda body: (200, completion(describe(body) if self.well else "pink"))
        behaviour.control = self.control

    def control(self, body: dict, token: str | None) -> tuple[int, dict]:
        if token != "mark":
            return 403, {"error": {"message": "no"}}
        if body["action"] not in self.knows:
            return 404, {"error": {"message": "no such route"}}
        self.actions.append(body["action"])
        self.well = self.well or body["action"] == self.cure
        return 200, {"done": True, "seconds": 0.1}


class Project:
    """Runs of the checker a minute apart. A restart, which the stand-in cannot do, is only recorded."""

    def __init__(self, settings, service: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.began, self.runs = settings, now(), 0
        self.restarts: list[str] = []
        settings.log_dir.mkdir(exist_ok=True)
        monkeypatch.setattr(check.Restarter, "restart", lambda _, target, verdict, decision: self.restarts.append(decision.reason) or "")

    def run(self) -> dict:
        after_s = 60.0 * self.runs
        self.runs += 1
        moment = replace(self.began, wall=self.began.wall + after_s, monotonic=self.began.monotonic + after_s)
        return check.run(self.settings, random.Random(self.runs), clock=lambda: moment).report

    def actions(self) -> list[tuple[str, str]]:
        store = Store.read_only(self.settings.log_dir)
        rows = store.actions()[::-1]
        store.close()
        return [(row["kind"], row["outcome"]) for row in rows]


@pytest.fixture
def project(service, make_settings, monkeypatch):
    return Project(make_settings(service, probe_token="mark", cure="restart", confirm_runs=1), service, monkeypatch)


def test_the_cheapest_rung_cures_and_is_checked_at_once(project, behaviour, describe):
    server = Corrupt(behaviour, describe, "drop-caches")

    report = project.run()

    assert server.actions == ["drop-caches", "fingerprint"]
    assert project.actions() == [("drop-caches", "done")]
    assert report["verdict"] == "healthy", "the run looks again after a rung"
    (rung,) = report["targets"]["api"]["rungs"]
    assert (rung["rung"], rung["outcome"]) == ("drop-caches", "done") and 0 < rung["seconds"] < 30
    assert "a picture question was answered right" in rung["detail"]
    assert project.restarts == []


def test_each_run_goes_one_rung_up_while_it_is_still_wrong(project, behaviour, describe):
    server = Corrupt(behaviour, describe, "nothing")

    for _ in range(5):
        report = project.run()

    assert server.actions == ["drop-caches", "fingerprint", "reload-weights", "fingerprint"], "each rung once"
    assert len(project.restarts) == 1
    assert project.actions() == [("drop-caches", "failed"), ("reload-weights", "failed"), ("hold", "noted"), ("person", "done")]
    decision = report["targets"]["api"]["decision"]
    assert decision["kind"] == "hold" and "a person is needed" in decision["reason"]


def test_a_person_is_told_by_a_message(project, behaviour, describe, service):
    Corrupt(behaviour, describe, "nothing")
    project.settings = project.settings.model_copy(update={"webhook_url": SecretStr(f"http://127.0.0.1:{service}/v1/chat/completions")})
    for _ in range(5):
        project.run()

    store = Store.read_only(project.settings.log_dir)
    messages = [row["message"] for row in store.rows("SELECT message FROM outbox WHERE kind = 'person'")]
    store.close()
    assert len(messages) == 1
    assert "a person is needed" in messages[0]["en"] and "需要人工处理" in messages[0]["zh"]


@pytest.mark.parametrize("lacks", ["routes", "token"])
def test_an_api_that_knows_no_rungs_is_restarted_in_the_same_run(project, behaviour, describe, lacks):
    server = Corrupt(behaviour, describe, "nothing", knows=())
    if lacks == "token":
        project.settings = project.settings.model_copy(update={"probe_token": None})

    project.run()

    assert server.actions == []
    assert len(project.restarts) == 1
    assert project.actions() == [("drop-caches", "impossible"), ("reload-weights", "impossible")]


def test_a_wrong_fingerprint_is_no_cure_although_a_question_is_answered_rightly(project, behaviour, describe):
    Corrupt(behaviour, describe, "drop-caches")
    store = Store.open(project.settings.log_dir)
    state = CheckerState.load(store, "")
    corrupt = {"nonfinite_total": 0, "nonfinite_recent": 0, "fingerprint": "differs", "fingerprint_stage": "layer 0"}
    behaviour.health = lambda: (200, {"state": "idle", "steps": 7, "corrupt": corrupt})
    verdict = api_rules.Verdict("api", "corrupt", "fingerprint_differs", "w", "w", cure=True)

    Cure(project.settings, store, state, None, random.Random(1)).carry_out("api", verdict, ladder.Decision("drop-caches", "corrupt"))

    (step,) = CheckerState.load(store, "").ladder.steps
    store.close()
    assert (step.outcome, "the fingerprint is differs" in step.detail) == ("failed", True)


def test_an_operators_reset_begins_the_ladder_anew(project, behaviour, describe):
    Corrupt(behaviour, describe, "nothing")
    project.run()
    store = Store.open(project.settings.log_dir)
    assert CheckerState.load(store, "").ladder.taken == ("drop-caches",)
    store.add_request(time.time(), "ann", "reset", "api", {"reason": "repaired"})
    project.settings = project.settings.model_copy(update={"cure": "off"})
    project.run()

    assert CheckerState.load(store, "").ladder == Ladder()
    store.close()
