"""The rates of the checker's test of right answers, simulated: `python -m bench.accuracy_rates`.

False alarms: three months of answers of a model that does not change, for each kind of question, including the luck of its
baseline. Falls: runs of the checker, with the questions that it would ask, after a model has fallen to a lower share. The
first uses the steps of `monitor/judge/accuracy.py` on many sequences at once, the second its functions one by one.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import numpy as np

from monitor.judge.accuracy import ALARM, BASELINE, EXACT, HELD, Accuracy, KindRecord, after_answers, is_like, steps
from monitor.judge.evidence import Answer
from monitor.observe.api_probe import MOST_EXTRA, regular_kind, suspicious_kind, watched_kind
from monitor.observe.question import PICTURE_KINDS

RUNS_OF_THREE_MONTHS = 3 * 30 * 24 * 60
TOGETHER = {"color": ("color", "shape"), "shape": ("color", "shape")}  # one question tests both


@dataclass(frozen=True)
class FalseAlarms:
    """`per_answer`: alarms for each answer of a kind; `asked`: share of the models whose baseline made the kind sure."""

    per_answer: float
    asked: float


def false_alarms(share: float, answers: int, sequences: int, seed: int) -> FalseAlarms:
    """Of a kind that is always answered rightly with probability `share`; each sequence takes its own baseline first."""
    rng = np.random.default_rng(seed)
    rights = rng.binomial(BASELINE, share, sequences)
    rights = np.array([right for right in rights if KindRecord(BASELINE, int(right)).sure], dtype=float)
    kept = len(rights)
    asked, score = np.full(kept, float(BASELINE)), np.zeros(kept)
    recent, recent_right, alarms = np.zeros(kept), np.zeros(kept), 0
    held, held_right = np.zeros(kept), np.zeros(kept)
    lowers, raises = _steps(rights, asked)
    for _ in range(answers):
        right = rng.random(kept) < share
        score = np.maximum(0.0, score + np.where(right, lowers, raises))
        recent += 1
        recent_right += right
        calm = score == 0.0
        exact = calm & (asked < EXACT)
        held[exact] += recent[exact]
        held_right[exact] += recent_right[exact]
        full = exact & (held >= HELD)
        if full.any():
            taken = full & np.array([held[i] > 0 and is_like(held_right[i], held[i], rights[i], asked[i]) for i in range(kept)])
            asked[taken] += held[taken]
            rights[taken] += held_right[taken]
            lowers[taken], raises[taken] = _steps(rights[taken], asked[taken])
            held[full] = held_right[full] = 0.0
        alarmed = score >= ALARM
        alarms += int(alarmed.sum())
        again = calm | alarmed
        score[again] = recent[again] = recent_right[again] = 0.0
    return FalseAlarms(alarms / (kept * answers) if kept else 0.0, kept / sequences)


def _steps(rights: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = [steps(right, number) for right, number in zip(rights, asked, strict=True)]
    return np.array([lowers for lowers, _ in pairs]), np.array([raises for _, raises in pairs])


def runs_until_told(
    shares: dict[str, float], baseline: KindRecord, rng: random.Random, most: int, at_once: int = 2, extra: int = MOST_EXTRA
) -> int | None:
    """Runs of the checker until an alarm, for a model that answers each kind about pictures rightly with this probability."""
    known = Accuracy(kinds=dict.fromkeys(shares, baseline), turns={"picture": rng.randrange(len(shares))})
    kinds = tuple(kind for kind in PICTURE_KINDS if kind in shares)
    for run in range(1, most + 1):
        known, _ = _after_run(known, "picture", kinds, shares, rng, at_once, extra)
        if any(record.fallen for record in known.kinds.values()):
            return run
    return None


def answers_of_three_months(share: float, seed: int, runs: int = 20_000) -> float:
    """Judged answers of all kinds that a healthy model gives in three months, with those that suspicion adds."""
    rng = random.Random(seed)
    exact = KindRecord(BASELINE, BASELINE, EXACT, round(EXACT * share))
    known, answers = Accuracy(kinds=dict.fromkeys((*PICTURE_KINDS, "copy"), exact)), 0
    shares = dict.fromkeys(known.kinds, share)
    for _ in range(runs):
        for family, kinds, at_once in (("text", ("copy",), 1), ("picture", PICTURE_KINDS, 2)):
            known, more = _after_run(known, family, kinds, shares, rng, at_once, MOST_EXTRA)
            answers += more
    return answers * RUNS_OF_THREE_MONTHS / runs


def _after_run(
    known: Accuracy, family: str, kinds: tuple[str, ...], shares: dict[str, float], rng: random.Random, at_once: int, extra: int
) -> tuple[Accuracy, int]:
    """What is known after the questions of one family in one run, as `Prober` asks them, and how many answers were judged."""
    tested: list[str] = []

    def ask(kind: str) -> Accuracy:
        tries = tuple((one, rng.random() < shares[one]) for one in TOGETHER.get(kind, (kind,)) if one in shares)
        tested.extend(one for one, _ in tries)
        return after_answers(known, [Answer(family, "right", tries=tries, questions=1)], 0.0)

    for _ in range(at_once):
        known = ask(regular_kind(known, family, kinds))
    watched = watched_kind(known, family, kinds, set(tested))
    if watched is not None:
        known = ask(watched)
    for _ in range(extra):
        suspicious = suspicious_kind(known, kinds)
        if suspicious is None:
            break
        known = ask(suspicious)
    return known, len(tested)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--answers", type=int, default=20_000, help="of each kind in a sequence of the false alarms")
    parser.add_argument("--seed", type=int, default=20261127)
    options = parser.parse_args()
    started = time.monotonic()
    print(f"{'share':>6} {'kind is asked':>14} {'per answer':>11} {'answers in 3 months':>20} {'alarms in 3 months':>19}")
    for share in (0.93, 0.95, 0.97, 0.99, 0.999):
        found, answers = false_alarms(share, options.answers, options.sequences, options.seed), answers_of_three_months(share, options.seed)
        print(f"{share:6.1%} {found.asked:14.0%} {found.per_answer:11.1e} {answers:20,.0f} {found.per_answer * answers:19.2f}", flush=True)
    cases = {
        "all kinds 97 -> 80 %": dict.fromkeys(PICTURE_KINDS, 0.80),
        "color alone 97 -> 80 %": {**dict.fromkeys(PICTURE_KINDS, 0.97), "color": 0.80},
        "where alone 97 -> 80 %": {**dict.fromkeys(PICTURE_KINDS, 0.97), "where": 0.80},
        "red and green swapped": {**dict.fromkeys(PICTURE_KINDS, 0.97), "color": 5 / 7},
        "blind": {"color": 1 / 7, "shape": 1 / 5, "count": 1 / 4, "read": 0.0, "where": 0.05},
    }
    print(f"\n{'fall':28} {'baseline':>14} {'median':>7} {'95 %':>6} {'99 %':>6} {'within 60 runs':>15}")
    for name, shares in cases.items():
        for label, baseline in (
            ("20 answers", KindRecord(20, 20)), ("200 answers", KindRecord(20, 20, 180, 174)), ("1000 answers", KindRecord(20, 20, 980, 950)),
        ):  # fmt: skip
            rng = random.Random(options.seed)
            runs = [runs_until_told(shares, baseline, rng, 600) or 600 for _ in range(options.sequences // (10 if label != "1000 answers" else 1))]
            marks = np.percentile(runs, (50, 95, 99))
            within = np.mean(np.array(runs) <= 60)
            print(f"{name:28} {label:>14} {marks[0]:7.0f} {marks[1]:6.0f} {marks[2]:6.0f} {within:15.1%}", flush=True)
    print(f"\n{options.sequences} sequences, seed {options.seed}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
