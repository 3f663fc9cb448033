"""The history of one target across runs, and how a verdict changes it: pure functions.

A bad verdict is confirmed by `needed` consecutive runs. A confirmed one opens an incident, which closes after `stable_s` of
good runs, so that flapping stays one incident. A run that cannot judge resets the count: missing data is never evidence
against the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from monitor.judge.evidence import Moment
from monitor.judge.verdict import Limits, Verdict

CLOCK_JUMP_S = 30.0
GAP_PERIODS = 3.0
FLAPS_KEPT = 20


@dataclass(frozen=True)
class Incident:
    """One incident of one target. Times are wall-clock seconds."""

    id: str
    target: str
    word: str
    rule: str
    opened_at: float
    first_seen_at: float
    last_bad_at: float
    en: str
    zh: str
    restarts: int = 0
    acted_at: float | None = None
    recovered_at: float | None = None
    flaps: int = 0
    reminders: int = 0
    symptoms: tuple[str, ...] = ()


@dataclass(frozen=True)
class History:
    """The state of one target. `seen` counts consecutive bad runs; `word` is the last confirmed verdict."""

    word: str = ""
    since: float = 0.0
    seen: int = 0
    counted_at: float = 0.0
    first_bad_at: float | None = None
    incident: Incident | None = None
    moment: Moment | None = None
    busy_since: float | None = None


@dataclass(frozen=True)
class Change:
    """What a run changed. `kind`: flip, opened, closed, recovered (good again, not yet stable), relapsed."""

    kind: str
    at: float
    target: str
    before: str
    after: str
    rule: str
    en: str
    zh: str
    incident: Incident | None = None


def why_inconclusive(before: Moment | None, now: Moment, limits: Limits) -> str:
    """Empty if the two moments are comparable, which they are not across a suspend or a clock step."""
    if before is None or (before.boot_id and now.boot_id and before.boot_id != now.boot_id):
        return ""
    jump_s = (now.wall - before.wall) - (now.monotonic - before.monotonic)
    if abs(jump_s) > CLOCK_JUMP_S:
        return f"the clock jumped by {jump_s:+.0f} s, or the machine was suspended"
    return ""


def advance(history: History, verdict: Verdict, now: Moment, limits: Limits) -> tuple[History, list[Change]]:
    """Adds the verdict of one run. Returns the new history, and the changes in order."""
    counted = _count_bad_runs(history, verdict, now, limits)
    if verdict.word == "unknown":
        return replace(counted, moment=now), []
    if verdict.bad and counted.seen < verdict.needed:
        # Not yet confirmed: neither the state nor an open incident changes.
        return replace(counted, moment=now, incident=_add_symptom(counted.incident, verdict, now)), []
    changes: list[Change] = []
    before = history.word or "unknown"
    if verdict.word != history.word:
        changes.append(_change("flip", now, verdict, before, counted.incident))
        counted = replace(counted, word=verdict.word, since=now.wall)
    busy_since = (history.busy_since or now.wall) if verdict.word == "busy" else None
    counted = replace(counted, moment=now, busy_since=busy_since)
    incident, more = _advance_incident(counted, verdict, now, limits, before)
    return replace(counted, incident=incident), changes + more


def after_restart(history: History, now: Moment) -> History:
    """Resets the count, so that a slow start does not count against the new process."""
    incident = history.incident
    if incident is not None:
        incident = replace(incident, restarts=incident.restarts + 1, acted_at=now.wall)
    return replace(history, seen=0, first_bad_at=None, incident=incident, moment=now)


def _count_bad_runs(history: History, verdict: Verdict, now: Moment, limits: Limits) -> History:
    if not verdict.bad:
        return replace(history, seen=0, first_bad_at=None, counted_at=0.0)
    gap_s = now.wall - history.counted_at
    fresh = history.seen == 0 or not 0 <= gap_s <= GAP_PERIODS * limits.period_s + limits.period_s + limits.budget_s
    if fresh:
        return replace(history, seen=1, counted_at=now.wall, first_bad_at=now.wall)
    if gap_s < limits.period_s / 2:  # two runs within half a period count as one
        return history
    return replace(history, seen=history.seen + 1, counted_at=now.wall)


def _advance_incident(
    history: History, verdict: Verdict, now: Moment, limits: Limits, before: str
) -> tuple[Incident | None, list[Change]]:
    incident = history.incident
    if verdict.bad:
        if incident is None:
            opened = _open(verdict, now, history.first_bad_at or now.wall)
            return opened, [_change("opened", now, verdict, before, opened)]
        relapsed = incident.recovered_at is not None
        incident = replace(_add_symptom(incident, verdict, now) or incident, recovered_at=None,
                           flaps=incident.flaps + (1 if relapsed else 0))  # fmt: skip
        return incident, [_change("relapsed", now, verdict, before, incident)] if relapsed else []
    if incident is None or not verdict.serving:
        return incident, []
    if incident.recovered_at is None:
        incident = replace(incident, recovered_at=now.wall)
        return incident, [_change("recovered", now, verdict, before, incident)]
    if not 0 <= now.wall - incident.recovered_at < limits.stable_s:
        return None, [_change("closed", now, verdict, before, incident)]
    return incident, []


def _open(verdict: Verdict, now: Moment, first_seen_at: float) -> Incident:
    # Unique, because a target has one open incident at a time.
    stamp = int(now.wall)
    return Incident(
        id=f"{stamp}-{verdict.target}-{verdict.word}", target=verdict.target, word=verdict.word, rule=verdict.rule,
        opened_at=now.wall, first_seen_at=first_seen_at, last_bad_at=now.wall, en=verdict.en, zh=verdict.zh,
        symptoms=(verdict.rule,),
    )  # fmt: skip


def _add_symptom(incident: Incident | None, verdict: Verdict, now: Moment) -> Incident | None:
    if incident is None:
        return None
    known = verdict.rule in incident.symptoms
    symptoms = incident.symptoms if known else (*incident.symptoms, verdict.rule)[:FLAPS_KEPT]
    return replace(incident, last_bad_at=now.wall, symptoms=symptoms)


def _change(kind: str, now: Moment, verdict: Verdict, before: str, incident: Incident | None) -> Change:
    return Change(
        kind, now.wall, verdict.target, before, verdict.word, verdict.rule, verdict.en, verdict.zh, incident
    )


def to_dict(history: History) -> dict[str, Any]:
    return asdict(history)


def from_dict(raw: Mapping[str, Any]) -> History:
    """The stored history. Unknown fields are dropped, missing ones get their default."""
    known = {name: raw[name] for name in History.__dataclass_fields__ if name in raw}
    if known.get("incident"):
        stored = known["incident"]
        incident = {name: stored[name] for name in Incident.__dataclass_fields__ if name in stored}
        incident["symptoms"] = tuple(incident.get("symptoms") or ())
        known["incident"] = Incident(**incident)
    if known.get("moment"):
        known["moment"] = Moment(**known["moment"])
    return History(**known)
