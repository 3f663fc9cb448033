"""The rungs of a cure for an API that computes wrongly, the cheapest first. Pure functions.

Rungs: drop the caches, reload the weights, restart the process, tell a person. A rung is taken once; the next run takes the
next one if the verdict is still bad. A cure that seemed to hold and did not is remembered for `REMEMBERED_S`: a fault that
comes back each hour must not get the cheapest rung each hour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict

DROP_CACHES, RELOAD_WEIGHTS, RESTART, PERSON = RUNGS = ("drop-caches", "reload-weights", "restart", "person")
CONTROL = (DROP_CACHES, RELOAD_WEIGHTS)  # done by the running API at POST /control
NAMES = {
    DROP_CACHES: ("dropping the caches", "清空缓存"), RELOAD_WEIGHTS: ("reloading the weights", "重新载入权重"),
    RESTART: ("restarting the process", "重启进程"), PERSON: ("telling a person", "通知人工处理"),
}  # fmt: skip
REMEMBERED_S = 6 * 3600.0


@dataclass(frozen=True)
class Step:
    """One rung that was taken. `outcome`: done, failed, impossible (the API cannot do it). `seconds`: with the check after it."""

    rung: str
    at: float
    outcome: str
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Ladder:
    """The position: `steps` in order. `seen`: how often the API had counted its fault when the last rung was taken."""

    steps: tuple[Step, ...] = ()
    seen: int | None = None

    @property
    def taken(self) -> tuple[str, ...]:
        return tuple(step.rung for step in self.steps)


def applies(verdict: Verdict) -> bool:
    """Whether wrong computing is what must be cured; a process that is gone or hangs needs a restart and nothing less."""
    wrong = verdict.rule in ("picture_wrong", "text_wrong") or verdict.rule.startswith("accuracy_")
    return verdict.target == "api" and verdict.cure and (verdict.word == "corrupt" or wrong)


def decide(restart: Decision, verdict: Verdict, ladder: Ladder, now: float) -> Decision:
    """Replaces the limiter's decision for a restart by the rung that is due. Holds, shadow mode and limits stay as they are."""
    if not applies(verdict) or restart.kind not in ("restart", "shadow"):
        return restart
    rung = next_rung(recent(ladder, now))
    if rung == PERSON:
        tried = ", ".join(f"{NAMES[step.rung][0]} ({step.outcome})" for step in ladder.steps if step.rung != PERSON)
        told = PERSON in ladder.taken
        return Decision("hold", f"{tried} did not cure {verdict.rule}; a person is needed", tells=not told)
    if not _is_new(verdict, recent(ladder, now)):
        return Decision("hold", f"nothing new since {NAMES[ladder.taken[-1]][0]}; the next rung is taken if it happens again")
    if restart.kind == "shadow" or rung == RESTART:
        return replace(restart, reason=f"{verdict.word}: {verdict.rule}; {NAMES[rung][0]}")
    return Decision(rung, f"{verdict.word}: {verdict.rule}")


def next_rung(ladder: Ladder) -> str:
    return next((rung for rung in RUNGS[:-1] if rung not in ladder.taken), PERSON)


def recent(ladder: Ladder, now: float) -> Ladder:
    """Empty if the last rung was taken long ago."""
    # abs: a clock that was set back
    return ladder if ladder.steps and abs(now - ladder.steps[-1].at) < REMEMBERED_S else Ladder()


def took(ladder: Ladder, step: Step, seen: int | None) -> Ladder:
    return replace(recent(ladder, step.at), steps=(*recent(ladder, step.at).steps, step), seen=seen)


def _is_new(verdict: Verdict, ladder: Ladder) -> bool:
    """A count over ten minutes still holds what happened before the last rung; only a rise since then is a reason to go on."""
    total = verdict.facts.get("nonfinite_total")
    if total is None or ladder.seen is None or not ladder.steps or ladder.steps[-1].outcome != "done":
        return True
    return int(total) != ladder.seen


def to_dict(ladder: Ladder) -> dict[str, Any]:
    return asdict(ladder)


def from_dict(raw: Mapping[str, Any]) -> Ladder:
    return Ladder(tuple(Step(**step) for step in raw.get("steps") or ()), raw.get("seen"))
