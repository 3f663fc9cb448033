"""Whether a restart is allowed now: back-off, limits per hour and day, and a circuit breaker. Pure functions.

Reaching a limit opens the circuit until an operator resets it, because a service that needs more restarts than that needs
a person. Times are wall-clock seconds; the caller stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from monitor.judge.history import History
from monitor.judge.verdict import Verdict

HOUR_S, DAY_S = 3600.0, 86400.0
BACKOFF_S = (0.0, 30.0, 60.0, 120.0, 300.0, 900.0)
APART_S = 60.0  # between restarts of the API and the page


@dataclass(frozen=True)
class Allowance:
    per_hour: int = 3
    per_day: int = 6


@dataclass(frozen=True)
class Limiter:
    """`restarts` of the last day, oldest first. `step` counts restarts since the target was last stable."""

    restarts: tuple[float, ...] = ()
    step: int = 0
    open_since: float | None = None
    open_reason: str = ""


@dataclass(frozen=True)
class Decision:
    """`kind`: none, restart, shadow (would restart), hold (a restart is due but not allowed), or a rung of the ladder.

    `opens`: the circuit opens now. `tells`: a person must be told that nothing is left to try.
    """

    kind: str
    reason: str
    opens: bool = False
    tells: bool = False


NONE = Decision("none", "")


def decide(
    verdict: Verdict, history: History, limiter: Limiter, allowance: Allowance, now: float, mode: str, hold: str = "",
    other_restart_at: float | None = None,
) -> Decision:  # fmt: skip
    """`history` includes this run. `mode` is GLM_CURE. `hold`: why restarts are on hold, empty if they are not."""
    if not verdict.bad or not verdict.cure or history.seen < verdict.needed:
        return NONE
    if mode == "off":
        return Decision("hold", "GLM_CURE=off")
    if hold:
        return Decision("hold", hold)
    incident = history.incident
    if verdict.attempts is not None and incident is not None and incident.restarts >= verdict.attempts:
        return Decision("hold", f"{incident.restarts} restart(s) did not cure {verdict.rule}; a person is needed")
    if limiter.open_since is not None:
        return Decision("hold", f"the circuit is open: {limiter.open_reason}. Run health_check.py reset once it is repaired")
    full = _limit_reached(limiter, allowance, now)
    if full:
        return Decision("hold", full, opens=True)
    if limiter.restarts:
        wait_s = BACKOFF_S[min(limiter.step, len(BACKOFF_S) - 1)]
        since_s = abs(now - limiter.restarts[-1])
        if since_s < wait_s:
            return Decision("hold", f"backing off: {since_s:.0f} s of {wait_s:.0f} s since the last restart")
    if other_restart_at is not None and abs(now - other_restart_at) < APART_S:
        return Decision("hold", "the other target was restarted less than a minute ago")
    return Decision("shadow" if mode == "shadow" else "restart", f"{verdict.word}: {verdict.rule}")


def restarted(limiter: Limiter, now: float) -> Limiter:
    return replace(limiter, restarts=(*_recent(limiter, now, DAY_S), now), step=limiter.step + 1)


def opened(limiter: Limiter, now: float, reason: str) -> Limiter:
    return replace(limiter, open_since=now, open_reason=reason)


def stable(limiter: Limiter) -> Limiter:
    """Resets the back-off after an incident has closed. The limits per hour and day still count."""
    return replace(limiter, step=0)


def reset() -> Limiter:
    return Limiter()


def _limit_reached(limiter: Limiter, allowance: Allowance, now: float) -> str:
    for name, limit, window_s in (("hour", allowance.per_hour, HOUR_S), ("day", allowance.per_day, DAY_S)):
        count = len(_recent(limiter, now, window_s))
        if count >= limit:
            return f"{count} restarts in the last {name}, {limit} allowed"
    return ""


def _recent(limiter: Limiter, now: float, window_s: float) -> tuple[float, ...]:
    # abs: restarts still count if the clock was set back and they lie in the future.
    return tuple(at for at in limiter.restarts if abs(now - at) < window_s)


def to_dict(limiter: Limiter) -> dict[str, Any]:
    return asdict(limiter)


def from_dict(raw: Mapping[str, Any]) -> Limiter:
    known = {name: raw[name] for name in Limiter.__dataclass_fields__ if name in raw}
    known["restarts"] = tuple(known.get("restarts") or ())
    return Limiter(**known)
