"""The console's arithmetic: state and age, uptime, bars, gaps, timelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from console_record import HEALTHY, INCIDENT, STARTING, WEDGED, incident_of, record

from web.console import check_history, checker_store
from web.console.check_history import BAR_S, Point
from web.console.checker_store import History, HistoryUnavailable

NOW = 1_800_000_000.0
DAY_S = 86400.0


def past(log_dir: Path, verdict_at: Any, hours: float = 2, step_s: float = 60) -> History:
    record(log_dir, NOW, hours, verdict_at, step_s)
    return checker_store.read(log_dir, NOW)


def now_of(history: History, now: float = NOW) -> check_history.CurrentState:
    return check_history.current_state(history.runs, history.flips, now, 60)


def test_a_missing_store_is_an_expected_error(tmp_path: Path) -> None:
    with pytest.raises(HistoryUnavailable):
        checker_store.read(tmp_path, NOW)


def test_without_a_check_there_is_no_data() -> None:
    assert check_history.current_state([], [], NOW, 60) == check_history.CurrentState("none")


def test_a_healthy_service_is_up_since_the_trouble_ended(tmp_path: Path) -> None:
    history = past(tmp_path, lambda age: WEDGED if age > 600 else HEALTHY)

    what = now_of(history)

    assert (what.state, what.stale, what.age_s) == ("up", False, 0)
    assert what.since == NOW - 600
    assert what.reasons == ()


def test_a_bad_verdict_has_its_target_and_reason_in_both_languages(tmp_path: Path) -> None:
    what = now_of(past(tmp_path, lambda age: WEDGED if age < 300 else HEALTHY))

    assert (what.state, what.word) == ("down", "wedged")
    assert what.since == NOW - 240
    (reason,) = what.reasons
    assert reason["target"] == "api"
    assert "no step for 140 s" in reason["en"]
    assert "没有进展" in reason["zh"]


def test_an_old_check_gives_no_current_state(tmp_path: Path) -> None:
    history = past(tmp_path, lambda age: HEALTHY)

    assert now_of(history, NOW + 119).state == "up"
    what = now_of(history, NOW + 121)
    assert (what.state, what.stale, what.word) == ("none", True, "healthy")


def test_uptime_counts_only_conclusive_checks(tmp_path: Path) -> None:
    unknown = {**HEALTHY, "word": "unknown"}
    history = past(tmp_path, lambda age: WEDGED if age < 1800 else unknown if age < 3600 else HEALTHY)

    found = check_history.uptime(history.minutes, "api", 60, 7200, NOW)

    # 61 good checks, 30 bad ones, 30 that could not judge.
    assert found.share == pytest.approx(61 / 91)
    assert found.coverage == pytest.approx(1, abs=0.02)


def test_checks_that_follow_each_other_faster_than_the_period_see_no_more_time() -> None:
    row = {"start": NOW - 3600, "words": {"api": {"healthy": 30}}, "sums": {"seen_s": [90.0, 30, 3.0]}}

    found = check_history.uptime([row], "api", 3600, DAY_S, NOW)

    assert (found.seen_s, found.coverage) == (90.0, 90.0 / DAY_S)


def test_time_without_checks_lowers_the_coverage_and_not_the_uptime(tmp_path: Path) -> None:
    history = past(tmp_path, lambda age: HEALTHY if age < 6 * 3600 else None, hours=12)

    found = check_history.uptime(history.minutes, "api", 60, DAY_S, NOW)

    assert found.share == 1
    assert found.coverage == pytest.approx(0.25, abs=0.01)


def test_a_target_that_was_never_checked_has_no_uptime(tmp_path: Path) -> None:
    history = past(tmp_path, lambda age: HEALTHY)

    assert check_history.uptime(history.minutes, "front", 60, DAY_S, NOW).share is None


def test_a_start_is_not_uptime(tmp_path: Path) -> None:
    history = past(tmp_path, lambda age: STARTING, hours=1)

    assert check_history.uptime(history.minutes, "api", 60, DAY_S, NOW).share == 0


def test_the_bars_show_the_worst_state_of_each_quarter_hour(tmp_path: Path) -> None:
    # One bad check in an hour of good ones, and a checker that was off before.
    history = past(tmp_path, lambda age: None if age > 4 * 3600 else WEDGED if age == 7200 else HEALTHY, hours=10)

    bars = check_history.bars(history.minutes, "api", NOW)

    assert len(bars) == 96
    assert [bar.start for bar in bars] == [bars[0].start + n * BAR_S for n in range(96)]
    assert bars[-1].start <= NOW < bars[-1].start + BAR_S
    bad = [bar for bar in bars if bar.state == "down"]
    assert [bar.word for bar in bad] == ["wedged"]
    assert bad[0].start <= NOW - 7200 < bad[0].start + BAR_S
    assert bad[0].checks == 15
    assert all(bar.state == "none" and bar.checks == 0 for bar in bars[:78])
    assert sum(bar.state == "up" for bar in bars) == 16
    assert all((bar.answer_s is None) is (bar.state == "none") for bar in bars)
    assert all(0.8 <= (bar.answer_s or 0) <= 1.1 for bar in bars if bar.state == "up")
    assert all(bar.answer_s is None for bar in check_history.bars(history.minutes, "page", NOW))


def test_a_line_breaks_where_data_is_missing() -> None:
    points = [Point(0, 1.0), Point(60, 2.0), Point(600, 3.0)]

    assert check_history.with_gaps(points, 60) == [Point(0, 1.0), Point(60, 2.0), Point(120, None), Point(600, 3.0)]


def test_points_are_means_and_oldest_first(tmp_path: Path) -> None:
    history = past(tmp_path, lambda age: HEALTHY, hours=0.1, step_s=30)

    of_runs = check_history.points_of_runs(history.runs, "gpu_memory_used")
    of_minutes = check_history.points_of_rollups(history.minutes, "gpu_memory_used")

    assert [point.at for point in of_runs] == sorted(point.at for point in of_runs)
    assert {point.value for point in of_minutes} == {21000.0}
    assert len(of_minutes) < len(of_runs)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.95, None), ([None, None], 0.5, None), ([3.0], 0.95, 3.0), ([1.0, 2.0, None, 3.0, 4.0], 0.5, 2.0),
     ([float(n) for n in range(1, 101)], 0.95, 95.0), ([float(n) for n in range(1, 21)], 0.95, 19.0)],
)  # fmt: skip
def test_a_percentile_is_one_of_the_values(values: list[float | None], share: float, expected: float | None) -> None:
    assert check_history.percentile(values, share) == expected


def test_a_timeline_has_the_events_of_its_incident_in_order() -> None:
    incident = {**incident_of(NOW, 600, 120), "closed_at": NOW - 60}
    flips = [
        {"target": "api", "at": NOW - 300, "before": "wedged", "after": "starting", "en": "It loads.", "zh": "加载。"},
        {"target": "page", "at": NOW - 310, "before": "healthy", "after": "dead", "en": "x", "zh": "x"},
        {"target": "api", "at": NOW - 5000, "before": "healthy", "after": "dead", "en": "x", "zh": "x"},
    ]
    actions = [
        {"incident": INCIDENT["id"], "at": NOW - 400, "kind": "restart", "actor": "checker", "outcome": "done", "detail": "34 s"},
        {"incident": "another", "at": NOW - 400, "kind": "restart", "actor": "checker", "outcome": "done", "detail": ""},
    ]

    moments = check_history.timeline(incident, flips, actions)

    assert [moment.kind for moment in moments] == ["began", "action", "flip", "recovered", "closed"]
    assert moments[1].text["en"] == "restart (checker): done. 34 s"
    assert moments[2].text["zh"].endswith("加载。")
