"""The share of users' requests that failed lately, from counts that the API keeps since its start. Pure functions.

A run judges the requests since the run before, and as many earlier ones as it takes to have ENOUGH, none older than
WINDOW_S. So under load the verdict follows at once, and of a few requests an hour nothing is concluded from one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from monitor.judge.evidence import Moment, Outcomes, SelfReport, Traffic
from monitor.judge.verdict import Limits

ENOUGH = 20
WINDOW_S = 600.0
# Failures that a new process would repeat, and that one user can cause at will: the time limit of a request passed, its schema
# cannot be followed, or it is too large for the device (a 413).
NOT_CURABLE = frozenset({"deadline", "grammar", "out_of_memory"})


@dataclass
class TrafficLog:
    """Kept between runs. `process` names the process that counted `counted`; `runs`: [ended at, began at, answered, failed].

    Times are CLOCK_MONOTONIC.
    """

    process: str = ""
    counted: Outcomes | None = None
    at: float = 0.0
    runs: list[tuple[float, float, int, dict[str, int]]] = field(default_factory=list)
    runs_failing: int = 0
    failing_at: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrafficLog:
        """The stored log; empty if it cannot be understood."""
        try:
            counted = Outcomes(int(raw["counted"]["answered"]), _counts(raw["counted"]["failed"])) if raw["counted"] else None
            runs = [(float(end), float(begin), int(answered), _counts(failed)) for end, begin, answered, failed in raw["runs"]]
            failing_at = raw["failing_at"] if raw["failing_at"] is None else float(raw["failing_at"])
            return cls(str(raw["process"]), counted, float(raw["at"]), runs, int(raw["runs_failing"]), failing_at)
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls()


def add_run(log: TrafficLog, report: SelfReport, moment: Moment, limits: Limits) -> Traffic | None:
    """The traffic to judge in this run; None if the API counts none, or none was counted before. Updates `log`."""
    if report.outcomes is None:
        return None
    process, since = _name(report, moment), _difference(log, report, moment)
    if log.process != process or since is None:
        log.runs, log.runs_failing, log.failing_at = [], 0, None
    began_at, known = log.at or moment.monotonic, log.process != ""
    log.process, log.counted, log.at = process, report.outcomes, moment.monotonic
    if since is None or not known:
        return None
    log.runs = [run for run in log.runs if 0 <= moment.monotonic - run[0] <= WINDOW_S]
    log.runs.append((moment.monotonic, min(began_at, moment.monotonic), since.answered, since.failed))
    traffic = _newest(log, moment)
    _count_failing(log, traffic, moment, limits)
    return Traffic(traffic.answered, traffic.failed, traffic.span_s, traffic.failed_now, log.runs_failing)


def is_failing(answered: int, failures: int, limits: Limits) -> bool:
    """Few failures are no evidence, whatever their share: one odd request would alarm on a quiet service."""
    return failures >= limits.failure_count and failures > limits.failure_share * (answered + failures)


def curable_failures(traffic: Traffic) -> int:
    return sum(many for reason, many in traffic.failed.items() if reason not in NOT_CURABLE)


def _counts(raw: Mapping[str, Any]) -> dict[str, int]:
    return {str(reason): int(many) for reason, many in raw.items()}


def _name(report: SelfReport, moment: Moment) -> str:
    one = report.identity
    return f"{one.pid} {one.start_time} {one.boot_id}" if one else f"unnamed {moment.boot_id}"


def _difference(log: TrafficLog, report: SelfReport, moment: Moment) -> Outcomes | None:
    """What was counted since the run before; a new process counts from zero. None if counts have fallen."""
    now = report.outcomes
    assert now is not None
    before = log.counted if log.process == _name(report, moment) else Outcomes()
    if before is None:
        return None
    failed = {reason: many - before.failed.get(reason, 0) for reason, many in now.failed.items()}
    answered = now.answered - before.answered
    fell = answered < 0 or any(many < 0 for many in failed.values()) or before.failed.keys() - now.failed.keys()
    return None if fell else Outcomes(answered, {reason: many for reason, many in failed.items() if many})


def _newest(log: TrafficLog, moment: Moment) -> Traffic:
    answered, failed, began_at = 0, dict[str, int](), moment.monotonic
    for _, began, more_answered, more_failed in reversed(log.runs):
        if answered + sum(failed.values()) >= ENOUGH:
            break
        answered, began_at = answered + more_answered, began
        for reason, many in more_failed.items():
            failed[reason] = failed.get(reason, 0) + many
    return Traffic(answered, failed, round(moment.monotonic - began_at, 1), sum(log.runs[-1][3].values()))


def _count_failing(log: TrafficLog, traffic: Traffic, moment: Moment, limits: Limits) -> None:
    """Counts runs with new failures; two within half a period count as one, a run without traffic changes nothing."""
    if not is_failing(traffic.answered, traffic.failures, limits):
        log.runs_failing, log.failing_at = 0, None
    elif traffic.failed_now and (log.failing_at is None or moment.monotonic - log.failing_at >= limits.period_s / 2):
        log.runs_failing, log.failing_at = log.runs_failing + 1, moment.monotonic
