"""One verdict from those of several replicas, who gets no requests, and the nginx before them."""

from __future__ import annotations

import pytest

from monitor.check import overall
from monitor.judge.evidence import FrontEvidence, PageReply, Process, Replica
from monitor.judge.front_rules import judge_front
from monitor.judge.replica_rules import judge_replicas, out_of_service
from monitor.judge.verdict import Limits, Verdict
from monitor.tell.alerts import compose, of_replica


def replicas(*words: str) -> list[Replica]:
    return [Replica(number, 8090 + number, "", word, "a_rule", f"text {number}.", f"文 {number}。") for number, word in enumerate(words)]


@pytest.mark.parametrize(
    ("words", "whole", "served", "out"),
    [
        (("healthy", "healthy"), "healthy", True, set()),
        (("healthy", "busy"), "healthy", True, set()),
        (("busy", "busy"), "busy", True, set()),
        (("healthy", "dead"), "degraded", True, {1}),
        (("degraded", "healthy"), "degraded", True, set()),
        (("wedged", "busy", "corrupt"), "degraded", True, {0, 2}),
        (("healthy", "unknown"), "degraded", True, set()),
        (("dead", "starting"), "starting", False, set()),
        (("dead", "unknown"), "unknown", False, {0}),
        (("dead", "wedged"), "dead", False, set()),
    ],
)
def test_users_are_served_while_one_replica_serves(words: tuple[str, ...], whole: str, served: bool, out: set[int]) -> None:
    found = replicas(*words)

    verdict = judge_replicas(found)

    assert (verdict.word, verdict.serving, verdict.cure) == (whole, served, False)
    assert out_of_service(found) == out
    for replica in found:
        not_well = replica.word not in ("healthy", "busy")
        assert (f"Replica {replica.number} is {replica.word}: text {replica.number}." in verdict.en) is not_well
        assert (f"副本 {replica.number} 为 {replica.word}" in verdict.zh) is not_well


GOOD = PageReply("answered", 0.01, 200)


@pytest.mark.parametrize(
    ("evidence", "word", "rule", "cure"),
    [
        (FrontEvidence("u", Process("runs", 7, 100.0, "ours"), GOOD), "healthy", "front_answers", False),
        (FrontEvidence("u", Process("gone", 7)), "dead", "process_gone", True),
        (FrontEvidence("u", Process("runs", 7, 100.0, "ours"), PageReply("silent", 5.0)), "zombie", "front_silent", True),
        (FrontEvidence("u", Process("stopped", 7, 100.0, "ours"), PageReply("silent", 5.0)), "zombie", "front_silent", True),
        (FrontEvidence("u", Process("runs", 7, 2.0, "nobody"), PageReply("refused")), "starting", "process_fresh", False),
        (FrontEvidence("u", Process("runs", 7, 100.0, "stranger", "pid 9"), GOOD), "dead", "port_taken", False),
        (FrontEvidence("u", Process(start_failure="no nginx"), PageReply("refused")), "dead", "not_started", False),
        (FrontEvidence("u", Process("runs", 7, 100.0, "ours", restarting=True), PageReply("refused")), "starting", "restarting", False),
        (FrontEvidence("u", Process("runs", 7, 100.0, "ours"), GOOD, blind="no socket"), "unknown", "checker_blind", False),
    ],
)
def test_nginx_is_judged_by_what_it_answers_itself(evidence: FrontEvidence, word: str, rule: str, cure: bool) -> None:
    verdict = judge_front(evidence, Limits())

    assert (verdict.target, verdict.word, verdict.rule, verdict.cure) == ("front", word, rule, cure)


def test_nobody_is_served_through_an_nginx_that_is_gone() -> None:
    verdicts = {"api": judge_replicas(replicas("healthy", "healthy")), "front": judge_front(FrontEvidence("u", Process("gone", 7)), Limits())}

    assert overall(verdicts) == ("dead", False)


def test_a_degraded_whole_is_told_by_the_replica_s_own_alert_which_names_it() -> None:
    from monitor.judge.history import Change

    flip = Change("flip", 1.0, "api", "healthy", "degraded", "replicas", "1 of 2 replicas serves.", "…")
    back = Change("flip", 1.0, "api", "degraded", "healthy", "replicas", "All 2 replicas serve.", "…")
    verdict = Verdict("api", "degraded", "replicas", "", "")

    assert compose([flip, back], [], {}, {"api": verdict}, {}, None, 1.0) == []  # type: ignore[arg-type]
    message = {"kind": "fire", "en": "api: dead.", "zh": "api：dead。"}
    assert of_replica([message], 3) == [{"kind": "fire", "en": "Replica 3: api: dead.", "zh": "副本 3：api：dead。"}]
    assert of_replica([message], None) == [message]
