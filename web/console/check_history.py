"""Derives from the checker's rows: the current state with its age, uptime, bars, trends, timelines. Pure functions.

Time without a check is shown as no data and counts neither as up nor as down. All times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["up", "busy", "degraded", "starting", "down", "unknown", "none"]

# The checker's verdicts, reduced to what the console colours.
STATES: dict[str, State] = {
    "healthy": "up", "busy": "busy", "degraded": "degraded", "starting": "starting", "unknown": "unknown",
    "broken": "down", "wedged": "down", "zombie": "down", "hardware": "down", "dead": "down", "corrupt": "down",
}  # fmt: skip
WORST_LAST: tuple[State, ...] = ("none", "up", "busy", "unknown", "starting", "degraded", "down")
UP: tuple[State, ...] = ("up", "busy", "degraded")
# What the checker does, in words; the rungs of its cure first.
ACTIONS = {
    "drop-caches": {"en": "dropped the caches", "zh": "清空缓存"},
    "reload-weights": {"en": "loaded the weights again", "zh": "重新加载权重"},
    "restart": {"en": "restart", "zh": "重启"},
    "hold": {"en": "no restart", "zh": "未重启"},
    "shadow": {"en": "would restart", "zh": "本应重启"},
}
STALE_PERIODS = 2.0
BARS, BAR_S = 96, 900.0
GAP_WIDTHS = 2.5  # a longer gap between two points, in widths of an interval, breaks the line


def state_of(word: str) -> State:
    return STATES.get(word, "unknown")


def worst(states: Iterable[State]) -> State:
    return max(states, key=WORST_LAST.index, default="none")


@dataclass(frozen=True)
class CurrentState:
    """The state of the service. `word`: the verdict; `since`: when it began, None if unknown.

    `age_s`: since the last check, None if there was none; `stale`: the last check is too old to judge the present.
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
    """When the current state began: the first of the last checks in a row with that state."""
    began = runs[0]["at"]
    for run in runs:
        if state_of(run["word"]) != state_of(runs[0]["word"]):
            return began
        began = run["at"]
    # Earlier than the oldest run: at the newest flip before it, if there is one.
    earlier = [flip["at"] for flip in flips if flip["at"] <= began]
    return max(earlier, default=began)


@dataclass(frozen=True)
class Uptime:
    """`share`: of the checks that found it serving; `coverage`: of the time that was checked at all. Both 0 to 1.

    `seen_s`: that time, in seconds.
    """

    share: float | None
    coverage: float
    seen_s: float = 0.0


def uptime(
    rollups: Sequence[Mapping[str, Any]], target: str, width_s: float, span_s: float, now: float, period_s: float = 60.0
) -> Uptime:
    """From roll-ups of `width_s` each. Checks with the verdict unknown do not count. A check sees `period_s` at most."""
    up = down = 0
    covered_s = 0.0
    for row in rollups:
        if row["start"] < now - span_s - width_s:
            continue
        counts = (row["words"] or {}).get(target)
        if not counts:
            continue
        # Runs may follow each other faster than the period. Roll-ups of an earlier version do not say what their runs have seen.
        seen_s = ((row.get("sums") or {}).get("seen_s") or [period_s * sum(counts.values())])[0]
        covered_s += min(width_s, seen_s, max(0.0, now - row["start"]))
        up += sum(runs for word, runs in counts.items() if state_of(word) in UP)
        down += sum(runs for word, runs in counts.items() if state_of(word) in ("down", "starting"))
    share = up / (up + down) if up + down else None
    return Uptime(share, min(1.0, covered_s / span_s), covered_s)


@dataclass(frozen=True)
class Bar:
    """One interval of `BAR_S` and the worst state in it. `checks`: how many there were; 0 for no data.

    `answer_s`: mean duration of the checker's image questions, None if it asked none.
    """

    start: float
    state: State
    word: str = ""
    checks: int = 0
    answer_s: float | None = None


def bars(minutes: Sequence[Mapping[str, Any]], target: str, now: float) -> list[Bar]:
    """The last 24 h, oldest first, from minute roll-ups."""
    end = (now // BAR_S + 1) * BAR_S
    rows_by_start: dict[float, list[Mapping[str, Any]]] = {end - (n + 1) * BAR_S: [] for n in reversed(range(BARS))}
    for row in minutes:
        if (rows := rows_by_start.get(row["start"] // BAR_S * BAR_S)) is not None:
            rows.append(row)
    return [_bar(start, rows, target) for start, rows in rows_by_start.items()]


def _bar(start: float, rows: Sequence[Mapping[str, Any]], target: str) -> Bar:
    counts: dict[str, int] = {}
    for row in rows:
        for word, runs in ((row["words"] or {}).get(target) or {}).items():
            counts[word] = counts.get(word, 0) + runs
    durations = [(row["sums"] or {}).get("picture_s") or (0.0, 0, 0.0) for row in rows] if target == "api" else []
    questions = sum(count for _, count, _ in durations)
    answer_s = sum(total for total, _, _ in durations) / questions if questions else None
    worst_word = max(counts, key=lambda word: WORST_LAST.index(state_of(word)), default="")
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
    """Adds a point without a value to each gap, so that the line breaks there instead of bridging it."""
    result: list[Point] = []
    for point in points:
        if result and point.at - result[-1].at > GAP_WIDTHS * width_s:
            result.append(Point(result[-1].at + width_s, None))
        result.append(point)
    return result


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
    """What happened to the incident's target from the first symptom to the end, oldest first."""
    begin = incident["first_seen_at"] or incident["opened_at"]
    end = incident["closed_at"] or float("inf")
    events = [TimelineEvent(begin, "began", {"en": incident["en"], "zh": incident["zh"]})]
    for flip in flips:
        if flip["target"] == incident["target"] and begin < flip["at"] <= end:
            change = f"{flip['before']} → {flip['after']}: "
            events.append(TimelineEvent(flip["at"], "flip", {"en": change + flip["en"], "zh": change + flip["zh"]}))
    for action in actions:
        if action["incident"] == incident["id"]:
            kinds = ACTIONS.get(action["kind"], {})
            rest = f" ({action['actor']}): {action['outcome']}. {action['detail']}".rstrip()
            description = {language: kinds.get(language, action["kind"]) + rest for language in ("en", "zh")}
            events.append(TimelineEvent(action["at"], "action", description))
    for message in messages:
        if message["incident"] == incident["id"]:
            kind = "alert_sent" if message["sent_at"] else "alert_waits"
            channel = {"en": message["channel"], "zh": message["channel"]}
            events.append(TimelineEvent(message["sent_at"] or message["made_at"], kind, channel))
    for kind in ("recovered", "closed"):
        if at := incident[f"{kind}_at"]:
            events.append(TimelineEvent(at, kind, {"en": "", "zh": ""}))
    return sorted(events, key=lambda event: event.at)
