"""What the checker's rows say: the current state with its age, uptime, bars, trends, timelines. Pure functions.

Time without a check is no data: it counts neither as up nor as down, and is shown. All times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["up", "busy", "degraded", "starting", "down", "unknown", "none"]

# The checker's verdicts, reduced to what the console colours.
STATES: dict[str, State] = {
    "healthy": "up", "busy": "busy", "degraded": "degraded", "starting": "starting", "unknown": "unknown",
    "broken": "down", "wedged": "down", "zombie": "down", "hardware": "down", "dead": "down",
}  # fmt: skip
WORST_LAST: tuple[State, ...] = ("none", "up", "busy", "unknown", "starting", "degraded", "down")
UP: tuple[State, ...] = ("up", "busy", "degraded")
STALE_PERIODS = 2.0
BARS, BAR_S = 96, 900.0
GAP_WIDTHS = 2.5  # a longer gap between two points breaks the line


def state_of(word: str) -> State:
    return STATES.get(word, "unknown")


def worst(states: Iterable[State]) -> State:
    return max(states, key=WORST_LAST.index, default="none")


@dataclass(frozen=True)
class CurrentState:
    """The state in the sentence on top. `word`: the verdict; `since`: when it began, None if unknown.

    `age_s`: since the last check, None if there was none; `stale`: too old to say anything about now.
    """

    state: State
    word: str = ""
    since: float | None = None
    age_s: float | None = None
    stale: bool = True
    reasons: tuple[Mapping[str, str], ...] = ()  # {target, word, rule, en, zh} of what is not healthy


def current_state(runs: Sequence[Mapping[str, Any]], flips: Sequence[Mapping[str, Any]], now: float, period_s: float) -> CurrentState:
    """From the newest run. `runs` and `flips`: newest first."""
    if not runs:
        return CurrentState("none")
    last = runs[0]
    age_s = max(0.0, now - last["at"])
    stale = age_s > STALE_PERIODS * period_s
    targets = last["targets"] or {}
    reasons = tuple({"target": name, **verdict} for name, verdict in targets.items() if verdict["word"] != "healthy")
    state: State = "none" if stale else state_of(last["word"])
    return CurrentState(state, last["word"], _began(runs, flips), age_s, stale, reasons)


def _began(runs: Sequence[Mapping[str, Any]], flips: Sequence[Mapping[str, Any]]) -> float | None:
    """Since when all checks in a row have had the state of the last one."""
    same = runs[0]["at"]
    for run in runs:
        if state_of(run["word"]) != state_of(runs[0]["word"]):
            return same
        same = run["at"]
    # It began before the oldest run: the newest flip before that, if there is one.
    earlier = [flip["at"] for flip in flips if flip["at"] <= same]
    return max(earlier, default=same)


@dataclass(frozen=True)
class Uptime:
    """`share`: of the checks that found it serving; `seen`: share of the time that was checked at all. Both 0 to 1."""

    share: float | None
    seen: float


def uptime(rollups: Sequence[Mapping[str, Any]], target: str, width_s: float, span_s: float, now: float) -> Uptime:
    """From roll-ups of `width_s` each. A check with the verdict unknown counts neither way."""
    up = down = 0
    seen_s = 0.0
    for row in rollups:
        if row["start"] < now - span_s - width_s:
            continue
        texts = (row["words"] or {}).get(target)
        if not texts:
            continue
        seen_s += min(width_s, now - row["start"])
        up += sum(runs for word, runs in texts.items() if state_of(word) in UP)
        down += sum(runs for word, runs in texts.items() if state_of(word) in ("down", "starting"))
    share = up / (up + down) if up + down else None
    return Uptime(share, min(1.0, seen_s / span_s))


@dataclass(frozen=True)
class Bar:
    """One interval of `BAR_S` and the worst state in it. `checks`: 0 where there is no data.

    `answer_s`: mean duration of the checker's image questions in it, None where none was asked.
    """

    start: float
    state: State
    word: str = ""
    checks: int = 0
    answer_s: float | None = None


def bars(minutes: Sequence[Mapping[str, Any]], target: str, now: float) -> list[Bar]:
    """The last 24 h, oldest first, from minute roll-ups."""
    end = (now // BAR_S + 1) * BAR_S
    found: dict[float, list[Mapping[str, Any]]] = {end - (n + 1) * BAR_S: [] for n in reversed(range(BARS))}
    for row in minutes:
        if (within := found.get(row["start"] // BAR_S * BAR_S)) is not None:
            within.append(row)
    return [_bar(start, rows, target) for start, rows in found.items()]


def _bar(start: float, rows: Sequence[Mapping[str, Any]], target: str) -> Bar:
    counts: dict[str, int] = {}
    for row in rows:
        for word, runs in ((row["words"] or {}).get(target) or {}).items():
            counts[word] = counts.get(word, 0) + runs
    asked = [(row["sums"] or {}).get("picture_s") or (0.0, 0, 0.0) for row in rows] if target == "api" else []
    times = sum(count for _, count, _ in asked)
    answer_s = sum(total for total, _, _ in asked) / times if times else None
    worst_word = max(counts, key=lambda each: WORST_LAST.index(state_of(each)), default="")
    return Bar(start, state_of(worst_word) if worst_word else "none", worst_word, sum(counts.values()), answer_s)


@dataclass(frozen=True)
class Point:
    at: float
    value: float | None


def points_of_runs(runs: Sequence[Mapping[str, Any]], reading: str) -> list[Point]:
    """Oldest first, from runs that are newest first."""
    return [Point(run["at"], (run["readings"] or {}).get(reading)) for run in reversed(runs)]


def points_of_rollups(rollups: Sequence[Mapping[str, Any]], reading: str) -> list[Point]:
    """Means, oldest first."""
    points = []
    for row in rollups:
        total, count, _ = (row["sums"] or {}).get(reading) or (0.0, 0, 0.0)
        points.append(Point(row["start"], total / count if count else None))
    return points


def with_gaps(points: Sequence[Point], width_s: float) -> list[Point]:
    """Adds a point without value wherever data is missing, so that the line breaks instead of bridging the gap."""
    drawn: list[Point] = []
    for point in points:
        if drawn and point.at - drawn[-1].at > GAP_WIDTHS * width_s:
            drawn.append(Point(drawn[-1].at + width_s, None))
        drawn.append(point)
    return drawn


def percentile(values: Iterable[float | None], share: float) -> float | None:
    """The nearest-rank percentile; `share`: 0 to 1."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return known[min(len(known) - 1, max(0, -(-int(share * 1000) * len(known) // 1000) - 1))]


def failed_checks(runs: Sequence[Mapping[str, Any]], since: float) -> int:
    return sum(1 for run in runs if run["at"] >= since and state_of(run["word"]) == "down")


@dataclass(frozen=True)
class TimelineEvent:
    """A line of an incident's timeline."""

    at: float
    kind: str  # began | flip | action | alert_sent | alert_waits | recovered | closed
    text: Mapping[str, str]


def timeline(
    incident: Mapping[str, Any], flips: Sequence[Mapping[str, Any]], actions: Sequence[Mapping[str, Any]],
    messages: Sequence[Mapping[str, Any]] = (),
) -> list[TimelineEvent]:  # fmt: skip
    """What happened to the incident's target from its first sign to its end, oldest first."""
    begin = incident["first_seen_at"] or incident["opened_at"]
    end = incident["closed_at"] or float("inf")
    moments = [TimelineEvent(begin, "began", {"en": incident["en"], "zh": incident["zh"]})]
    for flip in flips:
        if flip["target"] == incident["target"] and begin < flip["at"] <= end:
            change = f"{flip['before']} → {flip['after']}: "
            moments.append(TimelineEvent(flip["at"], "flip", {"en": change + flip["en"], "zh": change + flip["zh"]}))
    for action in actions:
        if action["incident"] == incident["id"]:
            description = f"{action['kind']} ({action['actor']}): {action['outcome']}. {action['detail']}".strip()
            moments.append(TimelineEvent(action["at"], "action", {"en": description, "zh": description}))
    for message in messages:
        if message["incident"] == incident["id"]:
            kind = "alert_sent" if message["sent_at"] else "alert_waits"
            by = {"en": message["channel"], "zh": message["channel"]}
            moments.append(TimelineEvent(message["sent_at"] or message["made_at"], kind, by))
    for kind in ("recovered", "closed"):
        if at := incident[f"{kind}_at"]:
            moments.append(TimelineEvent(at, kind, {"en": "", "zh": ""}))
    return sorted(moments, key=lambda moment: moment.at)
