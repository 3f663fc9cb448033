"""The sequential test on the share of right answers. `bench/accuracy_rates.py` has its rates from many more sequences."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from traces import api

from bench.accuracy_rates import answers_of_three_months, false_alarms, runs_until_told
from monitor.judge import accuracy
from monitor.judge.accuracy import ALARM, BASELINE, CLEAR, HELD, WATCHED, Accuracy, KindRecord, advance
from monitor.judge.api_rules import judge_api
from monitor.judge.evidence import Answer
from monitor.judge.verdict import Limits
from monitor.observe.api_probe import regular_kind, watched_kind
from monitor.observe.question import PICTURE_KINDS

TAKEN = KindRecord(BASELINE, BASELINE, CLEAR - BASELINE, CLEAR - BASELINE - 5)


def after(record: KindRecord, *rights: bool) -> KindRecord:
    for right in rights:
        record = advance(record, right)
    return record


def test_the_first_answers_are_the_baseline_and_judge_nothing() -> None:
    record = after(KindRecord(), *[False] * BASELINE)

    assert (record.asked, record.right, record.score, record.fallen) == (BASELINE, 0, 0.0, False)
    assert after(record, *[False] * 100) == record, "a kind that was never answered surely is not tested"


@pytest.mark.parametrize(("right", "sure"), [(20, True), (19, True), (18, True), (17, False), (10, False)])
def test_a_kind_is_sure_by_the_lower_bound_of_its_share(right: int, sure: bool) -> None:
    assert KindRecord(BASELINE, right).sure is sure


def test_one_wrong_answer_is_no_fall_and_ten_are() -> None:
    assert not after(TAKEN, False).fallen
    assert after(TAKEN, *[False] * 10).fallen


def test_right_answers_end_a_fall_only_after_a_while() -> None:
    fallen = after(TAKEN, *[False] * 10)

    assert after(fallen, *[True] * 20).fallen
    assert after(fallen, *[True] * 100).score == 0.0 and not after(fallen, *[True] * 100).fallen


def test_answers_without_suspicion_make_the_baseline_more_exact_and_those_of_a_fall_do_not() -> None:
    exact = after(KindRecord(BASELINE, BASELINE), *[True] * (HELD - 1))
    assert (exact.later_asked, exact.held_asked, exact.known) == (0, HELD - 1, BASELINE + HELD - 1)
    assert (after(exact, True).later_asked, after(exact, True).later_right) == (HELD, HELD)

    fallen = after(TAKEN, *[False] * 10, *[True] * 200)
    assert fallen.later_right / fallen.later_asked >= TAKEN.later_right / TAKEN.later_asked


def test_answers_that_together_speak_for_a_fall_do_not_become_normal() -> None:
    """Each suspicion of a slow fall may be dispelled, one after the other."""
    slow = after(TAKEN, *[False, *[True] * 7] * (2 * HELD // 8 + 1))

    assert not slow.fallen and slow.share == TAKEN.share and slow.answers == TAKEN.answers


def test_a_kind_that_was_answered_wrongly_is_asked_in_every_run_for_a_while() -> None:
    known = Accuracy(kinds=dict.fromkeys(PICTURE_KINDS, TAKEN), turns={"picture": 2})
    wrong = accuracy.after_answers(known, [Answer("picture", "wrong", tries=(("where", False),), questions=1)], 0.0)

    later = accuracy.after_answers(wrong, [Answer("picture", "right", tries=(("read", True),), questions=WATCHED)], 0.0)

    assert watched_kind(wrong, "picture", PICTURE_KINDS, {"color", "shape"}) == "where"
    assert watched_kind(wrong, "picture", PICTURE_KINDS, {"where"}) is None, "once a run is enough"
    assert watched_kind(later, "picture", PICTURE_KINDS, set()) is None
    assert watched_kind(known, "picture", PICTURE_KINDS, set()) is None


def test_color_and_shape_take_one_turn_because_one_question_tests_both() -> None:
    known = Accuracy(kinds=dict.fromkeys(PICTURE_KINDS, TAKEN))
    turns = [regular_kind(replace(known, turns={"picture": turn}), "picture", PICTURE_KINDS) for turn in range(4)]

    assert turns == ["color", "count", "read", "where"]


def test_another_model_starts_anew_and_an_unknown_one_changes_nothing() -> None:
    known = Accuracy({"model": "a"}, {"color": TAKEN})

    assert accuracy.for_model(known, None) == accuracy.for_model(known, {"model": "a"}) == known
    assert accuracy.for_model(known, {"model": "b"}).kinds == {}


def test_what_is_known_of_a_model_is_kept_while_another_engine_is_watched():
    known = Accuracy({"model": "a", "revision": "1"}, {"color": TAKEN}, 5.0, {"picture": 7}, wrong_at={"color": 6})
    elsewhere = {"model": "a", "revision": "", "recipe": "vllm", "engine": "http://127.0.0.1:8000"}

    away = accuracy.for_model(known, elsewhere)
    back = accuracy.for_model(accuracy.from_dict(json.loads(json.dumps(accuracy.to_dict(away)))), known.key)

    assert away.kinds == {} and away.earlier == {}, "the same model in another engine is another baseline"
    assert replace(back, others={}) == known
    for name in "bcdefg":
        back = accuracy.for_model(back, {"model": name})
    assert len(back.others) == 4


def test_a_new_process_must_show_that_it_answers_rightly() -> None:
    known = Accuracy(kinds={"color": after(TAKEN, *[False] * 10), "shape": TAKEN})

    renewed = accuracy.after_restart(known)

    assert (renewed.kinds["color"].score, renewed.kinds["color"].fallen) == (ALARM / 2, False)
    assert renewed.kinds["shape"] == TAKEN


def test_the_state_survives_its_storage() -> None:
    known = accuracy.after_answers(Accuracy({"model": "a"}), [Answer("picture", "right", tries=(("color", True),), questions=1)], 5.0)

    assert known.turns == {"picture": 1} and known.kinds["color"] == KindRecord(1, 1)
    assert accuracy.from_dict(accuracy.to_dict(known)) == known


def test_the_simulation_takes_the_steps_of_the_test() -> None:
    """`false_alarms` walks all sequences at once; here one of them by the functions."""
    share, answers = 0.8, 3000
    rng = np.random.default_rng(3)
    record = KindRecord(BASELINE, int(rng.binomial(BASELINE, share, 1)[0]))
    alarms = 0
    for right in (rng.random(1)[0] < share for _ in range(answers)):
        record = advance(record, bool(right))
        if record.fallen:
            alarms += 1
            record = KindRecord(record.asked, record.right, record.later_asked, record.later_right)

    found = false_alarms(share, answers, 1, 3)
    assert record.sure == bool(found.asked)
    assert round(found.per_answer * answers) == (alarms if record.sure else 0)


def test_a_healthy_model_gives_less_than_one_false_alarm_in_three_months() -> None:
    found = false_alarms(0.97, 8000, 800, 1)

    assert found.per_answer * answers_of_three_months(0.97, 1, 2000) < 1


@pytest.mark.parametrize("kinds", [PICTURE_KINDS, ("color",), ("where",)], ids=["all kinds", "color", "where"])
def test_a_fall_to_80_percent_is_told_within_an_hour(kinds: tuple[str, ...]) -> None:
    shares = {kind: 0.80 if kind in kinds else 0.97 for kind in PICTURE_KINDS}
    rng = random.Random(5)
    told = [runs_until_told(shares, TAKEN, rng, 60) for _ in range(200)]

    assert sum(run is not None for run in told) >= 194


def test_a_blind_model_is_told_within_two_runs() -> None:
    shares = {"color": 1 / 7, "shape": 1 / 5, "count": 1 / 4, "read": 0.0, "where": 0.05}
    rng = random.Random(5)

    assert all(runs_until_told(shares, KindRecord(BASELINE, BASELINE), rng, 2) for _ in range(100))


def test_new_files_that_answer_worse_than_the_ones_before_are_degraded_until_an_operator_accepts_them():
    """Whoever replaces the weights by wrong ones gets a new baseline, which must not hide it."""
    before = Accuracy({"model": "m", "revision": "1"}, {kind: KindRecord(20, 20) for kind in ("color", "shape")})
    swapped = replace(accuracy.for_model(before, {"model": "m", "revision": "2"}), kinds={"color": KindRecord(20, 5), "shape": KindRecord(20, 20)})
    answered = (Answer("text", "unjudged", 0.2, 200), Answer("picture", "right", 0.2, 200))

    known = accuracy.from_dict(json.loads(json.dumps(accuracy.to_dict(swapped))))
    verdict = judge_api(api(answers=answered, accuracy=accuracy.evidence_of(known, ("color", "shape"))), Limits())
    accepted = accuracy.evidence_of(accuracy.forget_earlier(known), ("color", "shape"))

    assert (verdict.word, verdict.rule, verdict.cure) == ("degraded", "accuracy_below_earlier", False)
    assert "color: 5 of 20 right, 100% before" in verdict.en and "shape" not in verdict.en
    assert judge_api(api(answers=answered, accuracy=accepted), Limits()).word == "healthy"
    assert accuracy.for_model(before, {"model": "another", "revision": "1"}).earlier == {}
