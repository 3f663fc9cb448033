"""Whether the model still answers as rightly as it did: a sequential test of each kind of question against its baseline.

A model's baseline is its first BASELINE answers of each kind on this machine; later answers that raised no suspicion make it
more exact, up to EXACT. The test is a CUSUM of log-likelihood ratios: a wrong answer raises a kind's score, a right one
lowers it, never below zero, and at ALARM the share has fallen, until the score is zero again. A kind with a wrong answer is
watched, that is asked in every run for a while, because one suspicion alone may be dispelled by luck.
`bench/accuracy_rates.py` simulates its rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from monitor.judge.evidence import AccuracyEvidence, Answer, ApiEvidence, Fall
from monitor.judge.verdict import Limits, Verdict

BASELINE = 20  # answers of each kind
EXACT = 1000
CLEAR = 200  # enough to tell a fall from 97 % to 80 %
SURE = 0.7  # the least share that the model must surely reach for a kind to be asked
ALARM = 10.5
# The test looks for odds of a wrong answer that are this many times those of the baseline: from 97 % right to 84 %.
FALL_ODDS = 6.0
CONFIDENCE_Z = 1.645  # one-sided bounds of 95 %
HELD = 100  # later answers are judged together before they make a baseline more exact, or a slow fall would become normal
MOST_OTHERS = 4
WATCHED = 60  # questions of the family after a wrong answer
MOST_RIGHT, LEAST_RIGHT = 0.985, 0.7  # of a baseline, so that one wrong answer never weighs too much or too little
BLIND_FROM = 5  # wrong answers and no right one, of all kinds about pictures, before there is a baseline


@dataclass(frozen=True)
class KindRecord:
    """One kind of question. `asked`, `right`: the baseline; `later_asked`, `later_right`: what made it more exact;
    `held_asked`, `held_right`: what may yet.

    `recent_asked`, `recent_right`: the answers since the score was last zero, the share of which is the share now.
    """

    asked: int = 0
    right: int = 0
    later_asked: int = 0
    later_right: int = 0
    held_asked: int = 0
    held_right: int = 0
    score: float = 0.0
    recent_asked: int = 0
    recent_right: int = 0
    fallen: bool = False

    @property
    def taken(self) -> bool:
        return self.asked >= BASELINE

    @property
    def sure(self) -> bool:
        return self.taken and lower_bound(self.right, self.asked) >= SURE

    @property
    def answers(self) -> int:
        return self.asked + self.later_asked

    @property
    def known(self) -> int:
        """Answers, with those that are held."""
        return self.answers + self.held_asked

    @property
    def share(self) -> float:
        """Of right answers, in the baseline with what made it more exact."""
        return (self.right + self.later_right) / self.answers if self.answers else 0.0


@dataclass(frozen=True)
class Accuracy:
    """Of one model on this machine: `key` has its model, revision and recipe. `turns`: questions asked by family.

    `others`: what is known of other models and engines, as stored.
    `wrong_at`: the turn of its family at which a kind was last answered wrongly.
    `earlier`: (answers, right ones) of the kinds that the revision or recipe before this one answered surely.
    """

    key: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, KindRecord] = field(default_factory=dict)
    taken_at: float | None = None
    turns: dict[str, int] = field(default_factory=dict)
    earlier: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong_at: dict[str, int] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)

    def record(self, kind: str) -> KindRecord:
        return self.kinds.get(kind, KindRecord())

    def watched(self, family: str, kinds: Iterable[str]) -> list[str]:
        """The sure ones of `kinds` that were answered wrongly lately, the latest first."""
        turn = self.turns.get(family, 0)
        found = [kind for kind in kinds if self.record(kind).sure and 0 <= turn - self.wrong_at.get(kind, -WATCHED) < WATCHED]
        return sorted(found, key=lambda kind: -self.wrong_at[kind])

    @property
    def suspicious(self) -> bool:
        return any(record.score > 0 for record in self.kinds.values())


def lower_bound(right: int, asked: int) -> float:
    """Wilson's lower bound of a share."""
    if not asked:
        return 0.0
    share, square = right / asked, CONFIDENCE_Z**2 / asked
    spread = CONFIDENCE_Z * math.sqrt(share * (1 - share) / asked + square / (4 * asked))
    return max(0.0, (share + square / 2 - spread) / (1 + square))


def in_control_share(right: int, asked: int) -> float:
    """The least share that a baseline of `right` of `asked` surely has."""
    return min(MOST_RIGHT, max(LEAST_RIGHT, lower_bound(right, asked)))


def is_like(held_right: int, held_asked: int, right: int, asked: int) -> bool:
    """Whether the held answers are no worse than luck makes those of a model with that baseline."""
    share = in_control_share(right, asked)
    return held_right / held_asked >= share - CONFIDENCE_Z * math.sqrt(share * (1 - share) / held_asked)


def steps(right: int, asked: int) -> tuple[float, float]:
    """What a right and a wrong answer add to the score, for a baseline of `right` of `asked`."""
    in_control = in_control_share(right, asked)
    odds = FALL_ODDS * (1 - in_control) / in_control
    fallen = 1 / (1 + odds)
    return math.log(fallen / in_control), math.log((1 - fallen) / (1 - in_control))


def advance(record: KindRecord, right: bool) -> KindRecord:
    """Adds one answer: to the baseline while that is being taken, then to the test. A kind that is not sure is not tested."""
    if not record.taken:
        return replace(record, asked=record.asked + 1, right=record.right + right)
    if not record.sure:
        return record
    lowers, raises = steps(record.right + record.later_right, record.answers)
    score = max(0.0, record.score + (lowers if right else raises))
    asked, rights = record.recent_asked + 1, record.recent_right + right
    if score == 0.0:
        record = _more_exact(record, asked, rights)
        return replace(record, score=0.0, recent_asked=0, recent_right=0, fallen=False)
    fallen = record.fallen or score >= ALARM
    return replace(record, score=min(score, ALARM), recent_asked=asked, recent_right=rights, fallen=fallen)


def _more_exact(record: KindRecord, asked: int, right: int) -> KindRecord:
    """Holds answers whose suspicion was dispelled, until there are enough to see whether all together are like the baseline."""
    if record.fallen or record.answers >= EXACT:
        return replace(record, held_asked=0, held_right=0)
    asked, right = record.held_asked + asked, record.held_right + right
    if asked < HELD:
        return replace(record, held_asked=asked, held_right=right)
    like = is_like(right, asked, record.right + record.later_right, record.answers)
    record = replace(record, held_asked=0, held_right=0)
    if not like:
        return record
    return replace(record, later_asked=record.later_asked + asked, later_right=record.later_right + right)


def for_model(accuracy: Accuracy, key: Mapping[str, str] | None) -> Accuracy:
    """What is known of the model of this key. An unknown key changes nothing.

    Another revision or recipe has a baseline of its own, which is compared with the earlier one. What is known of another model, or
    of another engine, is kept for when it is watched again.
    """
    if key is None or dict(key) == accuracy.key:
        return accuracy
    if _served(key) != _served(accuracy.key):
        others = dict(accuracy.others)
        if accuracy.key:
            others[_served(accuracy.key)] = asdict(replace(accuracy, others={}))
        known = from_dict(others.pop(_served(key), {}))
        others = dict(list(others.items())[-MOST_OTHERS:])
        return replace(for_model(known, key), others=others) if known.key else Accuracy(dict(key), others=others)
    sure = {kind: (record.answers, record.right + record.later_right) for kind, record in accuracy.kinds.items() if record.sure}
    return Accuracy(dict(key), earlier={**accuracy.earlier, **sure}, others=accuracy.others)


def _served(key: Mapping[str, str]) -> str:
    """What a baseline is kept for: a model, and which engine serves it if that is an external one."""
    return f"{key['model']} {key.get('engine', '')}".strip() if "model" in key else ""


def after_answers(accuracy: Accuracy, answers: Iterable[Answer], now: float) -> Accuracy:
    kinds, turns, wrong_at = dict(accuracy.kinds), dict(accuracy.turns), dict(accuracy.wrong_at)
    for answer in answers:
        turns[answer.kind] = turns.get(answer.kind, 0) + answer.questions
        for kind, right in answer.tries:
            kinds[kind] = advance(kinds.get(kind, KindRecord()), right)
            if not right:
                wrong_at[kind] = turns[answer.kind]
    taken_at = accuracy.taken_at
    if taken_at is None and any(record.taken for record in kinds.values()):
        taken_at = now
    return replace(accuracy, kinds=kinds, turns=turns, taken_at=taken_at, wrong_at=wrong_at)


def after_restart(accuracy: Accuracy) -> Accuracy:
    """A new process is tested anew, with half the way to the alarm where the old one had fallen."""
    kinds = {
        kind: replace(record, score=ALARM / 2 if record.fallen else 0.0, recent_asked=0, recent_right=0, fallen=False)
        for kind, record in accuracy.kinds.items()
    }
    return replace(accuracy, kinds=kinds)


def evidence_of(accuracy: Accuracy, pictures: Iterable[str]) -> AccuracyEvidence:
    """What the rules need to know. `pictures`: the kinds that are about a picture."""
    falls = tuple(
        Fall(kind, record.recent_asked, record.recent_right, record.answers, record.right + record.later_right)
        for kind, record in sorted(accuracy.kinds.items())
        if record.fallen
    )
    seen = [accuracy.record(kind) for kind in pictures]
    right, asked = sum(record.right for record in seen), sum(record.asked for record in seen)
    sure = tuple(sorted(kind for kind, record in accuracy.kinds.items() if record.sure))
    taken = sum(record.taken for record in accuracy.kinds.values())
    blind = not right and asked >= BLIND_FROM and not any(record.sure for record in seen)
    worse = tuple(
        Fall(kind, accuracy.record(kind).answers, accuracy.record(kind).right + accuracy.record(kind).later_right, *accuracy.earlier[kind])
        for kind in sorted(accuracy.earlier)
        if accuracy.record(kind).taken and not accuracy.record(kind).sure
    )
    return AccuracyEvidence(falls, sure, taken, blind, right, asked, worse)


def judge_accuracy(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """For a run in which every question was answered, but not all of them surely rightly."""
    asked = [answer for answer in evidence.answers if answer.outcome != "skipped"]
    if not asked or not all(answer.good for answer in asked):
        return None
    known = evidence.accuracy or AccuracyEvidence()
    if known.falls:
        return _fell(known.falls, limits)
    if known.worse:
        return _worse(known.worse)
    wrong = [answer for answer in asked if answer.outcome == "wrong"]
    unjudged = [answer for answer in asked if answer.outcome == "unjudged"]
    if unjudged and known.blind:
        return _blind(known)
    if evidence.hardware or (not wrong and not (unjudged and not any(answer.outcome == "right" for answer in asked))):
        return None
    facts = {answer.kind: answer.outcome for answer in asked}
    slowest = max(answer.seconds for answer in asked)
    if wrong:
        first = wrong[0]
        return Verdict(
            "api", "healthy", "answers_mostly_right",
            f"It answered in {slowest:.2f} s, one question wrongly (expected {first.expected}, got {first.text[:80]!r}); its share "
            "of right answers is still that of its baseline.",
            f"用时 {slowest:.2f} 秒给出回答，有一题答错（应为 {first.expected}，实为 {first.text[:80]!r}）；正确率仍与其基线相符。",
            {**facts, "expected": first.expected, "answer": first.text}, f"a score of {ALARM:g} in the sequential test",
        )  # fmt: skip
    return Verdict(
        "api", "healthy", "answers", f"It answered real questions in {slowest:.2f} s. Whether rightly is not judged: no sure "
        "baseline of this model on this machine yet.",
        f"真实提问得到回答，用时 {slowest:.2f} 秒。尚无该模型在本机的可靠基线，因此不判断对错。", facts, f"{BASELINE} answers of each kind",
    )  # fmt: skip


def _fell(falls: tuple[Fall, ...], limits: Limits) -> Verdict:
    en = "; ".join(f"{fall.kind}: {fall.right} of {fall.asked} right now, {fall.baseline:.0%} in the baseline" for fall in falls)
    zh = "；".join(f"{KIND_ZH.get(fall.kind, fall.kind)}：现在 {fall.asked} 题对 {fall.right} 题，基线为 {fall.baseline:.0%}" for fall in falls)
    return Verdict(
        "api", "broken", "accuracy_fell", f"It answers questions wrongly that it used to answer rightly ({en}).",
        f"以前能答对的问题现在答错（{zh}）。",
        {"kinds": {fall.kind: {"share": round(fall.share, 3), "baseline": round(fall.baseline, 3), "asked": fall.asked} for fall in falls}},
        f"a score of {ALARM:g} in the sequential test, on {limits.confirm_runs} runs in a row", cure=True,
        needed=limits.confirm_runs, attempts=2,
    )  # fmt: skip


def _worse(falls: tuple[Fall, ...]) -> Verdict:
    en = "; ".join(f"{fall.kind}: {fall.right} of {fall.asked} right, {fall.baseline:.0%} before" for fall in falls)
    zh = "；".join(f"{KIND_ZH.get(fall.kind, fall.kind)}：{fall.asked} 题对 {fall.right} 题，此前为 {fall.baseline:.0%}" for fall in falls)
    return Verdict(
        "api", "degraded", "accuracy_below_earlier", f"The model's files or recipe have changed, and it answers less rightly than before "
        f"({en}). If that is meant: health_check.py reset --reason WHY.",
        f"模型文件或计算方式已改变，正确率低于此前（{zh}）。如属预期：health_check.py reset --reason 原因。",
        {"kinds": {fall.kind: {"share": round(fall.share, 3), "earlier": round(fall.baseline, 3)} for fall in falls}},
        f"a lower bound of {SURE:.0%} for every kind that was answered surely before",
    )  # fmt: skip


def _blind(known: AccuracyEvidence) -> Verdict:
    return Verdict(
        "api", "degraded", "never_right", f"Not one of {known.pictures_asked} questions about pictures was answered rightly. This "
        "model has no baseline on this machine with which to tell a fault from what it cannot do, so nothing is restarted.",
        f"{known.pictures_asked} 道图片题无一答对。该模型在本机没有基线，无法区分故障与能力不足，因此不重启。",
        {"asked": known.pictures_asked, "right": known.pictures_right}, f"one right answer of {BLIND_FROM}",
    )  # fmt: skip


KIND_ZH = {
    "color": "颜色", "shape": "形状", "count": "数量", "read": "文字识别", "where": "位置", "arithmetic": "算术", "copy": "复述",
    "absent": "无图识别",
}  # fmt: skip


def forget_earlier(accuracy: Accuracy) -> Accuracy:
    """Takes the baseline of this revision as the normal one."""
    return replace(accuracy, earlier={})


def to_dict(accuracy: Accuracy) -> dict[str, Any]:
    return asdict(accuracy)


def from_dict(raw: Mapping[str, Any]) -> Accuracy:
    """The stored state; empty if there is none. Raises TypeError, ValueError or AttributeError for what is not such a state."""
    if not raw:
        return Accuracy()
    names = KindRecord.__dataclass_fields__
    kinds = {str(kind): KindRecord(**{n: v for n, v in record.items() if n in names}) for kind, record in raw.get("kinds", {}).items()}
    taken_at = raw.get("taken_at")
    return Accuracy(
        {str(name): str(value) for name, value in raw.get("key", {}).items()}, kinds,
        None if taken_at is None else float(taken_at), {str(name): int(value) for name, value in raw.get("turns", {}).items()},
        {str(kind): (int(asked), int(right)) for kind, (asked, right) in raw.get("earlier", {}).items()},
        {str(kind): int(turn) for kind, turn in raw.get("wrong_at", {}).items()},
        {str(name): dict(known) for name, known in raw.get("others", {}).items()},
    )  # fmt: skip
