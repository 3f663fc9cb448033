"""The share of users' requests that failed: differences of counts, small numbers, and what resets them."""

from __future__ import annotations

import json

import pytest

from monitor.judge.evidence import Identity, Moment, Outcomes, SelfReport, Traffic
from monitor.judge.traffic import TrafficLog, add_run, is_failing
from monitor.judge.verdict import Limits

LIMITS = Limits()


class Counts:
    """A process that counts, and the runs that read it."""

    def __init__(self) -> None:
        self.log, self.now, self.pid = TrafficLog(), 1000.0, 1
        self.answered, self.failed = 5000, {"engine": 70}
        self.run(0)

    def run(self, answered: int, after_s: float = 60.0, **failed: int) -> Traffic | None:
        self.now += after_s
        self.answered += answered
        for reason, many in failed.items():
            self.failed[reason] = self.failed.get(reason, 0) + many
        return self.read()

    def read(self) -> Traffic | None:
        self.log = TrafficLog.from_dict(json.loads(json.dumps(self.log.to_dict())))
        report = SelfReport(Identity(self.pid, 5, "boot"), outcomes=Outcomes(self.answered, dict(self.failed)))
        return add_run(self.log, report, Moment(9.0, self.now, "boot"), LIMITS)

    def restart(self) -> None:
        self.pid, self.answered, self.failed = self.pid + 1, 0, {}


def test_what_was_counted_before_the_first_run_is_no_evidence() -> None:
    assert Counts().run(5) == Traffic(5, {}, 60.0)


def test_under_load_only_the_last_run_counts() -> None:
    counts = Counts()
    assert counts.run(30, engine=29) == Traffic(30, {"engine": 29}, 60.0, 29, 1)
    assert counts.run(200) == Traffic(200, {}, 60.0, 0, 0), "it is over, and told so at once"


def test_of_few_requests_nothing_is_concluded_until_there_are_three_failures() -> None:
    counts = Counts()
    runs = [counts.run(0, engine=1) for _ in range(5)]

    assert [run.runs_failing for run in runs if run] == [0, 0, 1, 2, 3]
    assert not is_failing(0, 2, LIMITS) and is_failing(0, 3, LIMITS)


def test_one_failure_among_some_successes_is_soon_forgotten() -> None:
    counts = Counts()
    for _ in range(30):
        traffic = counts.run(3, **({"engine": 1} if counts.now % 600 < 60 else {}))
        assert traffic is not None and traffic.runs_failing == 0


def test_runs_without_traffic_neither_confirm_nor_acquit_until_the_window_has_passed() -> None:
    counts = Counts()
    assert counts.run(0, engine=5).runs_failing == 1
    idle = [counts.run(0) for _ in range(12)]

    assert [run.runs_failing for run in idle][:9] == [1] * 9, "no restart without new failures"
    assert idle[-1] == Traffic(0, {}, idle[-1].span_s, 0, 0) and idle[-1].share == 0


def test_two_runs_within_a_second_count_as_one() -> None:
    counts = Counts()
    assert [counts.run(0, after_s=1, engine=5).runs_failing for _ in range(4)] == [1, 1, 1, 1]


def test_a_new_process_begins_anew() -> None:
    counts = Counts()
    assert [counts.run(0, engine=9).runs_failing for _ in range(3)] == [1, 2, 3]
    counts.restart()

    assert counts.run(3, engine=1) == Traffic(3, {"engine": 1}, 60.0, 1, 0)


@pytest.mark.parametrize("change", [{"answered": 4}, {"failed": {"engine": 69}}, {"failed": {}}])
def test_counts_that_fall_are_no_evidence(change) -> None:
    counts = Counts()
    counts.run(50, engine=3)
    vars(counts).update(change)

    assert counts.read() is None
    assert counts.run(2) == Traffic(2, {}, 60.0), "the next difference is one again"


def test_the_share_at_its_limit_is_within_it() -> None:
    assert not is_failing(95, 5, LIMITS) and is_failing(94, 6, LIMITS)


@pytest.mark.parametrize("raw", [{}, {"process": 3}, {"runs": [[1]]}, {"counted": {"answered": "x"}}, {"counted": 5, "runs": {}}])
def test_a_damaged_log_begins_anew(raw) -> None:
    complete = TrafficLog("x", Outcomes(1, {}), 1.0, [(1.0, 0.0, 1, {})]).to_dict()

    assert TrafficLog.from_dict(complete) == TrafficLog("x", Outcomes(1, {}), 1.0, [(1.0, 0.0, 1, {})])
    assert TrafficLog.from_dict({**complete, **raw} if raw else raw).process in ("", "3")
