"""The scheduled nightly restart: when it happens, and every reason why it does not."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from traces import IDLE, RIGHT, RUNS, api, busy

from monitor.act import nightly
from monitor.judge.api_rules import judge_api
from monitor.judge.evidence import Moment, Observation
from monitor.judge.verdict import Limits
from monitor.store.state import CheckerState
from monitor.store.store import Store

NIGHT = datetime(2026, 11, 22, 4, 10, tzinfo=UTC).timestamp()
DAY_S = 86400.0


class Restarter:
    def __init__(self) -> None:
        self.restarts: list[tuple[str, str]] = []

    def restart(self, target, verdict, decision, actor="checker") -> str:
        self.restarts.append((target, actor))
        return ""


@pytest.fixture
def store(tmp_path):
    opened = Store.open(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def night(store, make_settings):
    """Runs the nightly check at a moment; returns its outcome and the restarts."""

    def run(at: float = NIGHT, first=IDLE, answers=RIGHT, age_s: float = 3 * DAY_S, rss_mib: float = 3000.0, **changes):
        settings = make_settings(1, **{"nightly_restart": "4", "timezone": "UTC", **changes})
        evidence = api(first=first, answers=answers, process=replace(RUNS, age_s=age_s))
        seen = Observation(Moment(at, 1.0), evidence, None, {"process": {"rss_mib": rss_mib}}, {})
        restarter = Restarter()
        outcome = nightly.run(settings, store, CheckerState.load(store, ""), restarter, {"api": judge_api(evidence, Limits())}, seen, at)
        return outcome, restarter.restarts

    return run


def test_off_restarts_nothing(night):
    assert night(nightly_restart="off") == ("", [])


def test_once_in_its_hour_and_not_again_that_day(night):
    assert night(NIGHT - 3600) == ("", [])
    assert night() == ("restarted", [("api", "nightly")])
    assert night(NIGHT + 60) == ("", []), "recorded in the store"
    assert night(NIGHT + DAY_S) == ("restarted", [("api", "nightly")])


def test_the_hour_is_that_of_the_settings_zone(night):
    assert night(NIGHT - 8 * 3600, timezone="Asia/Shanghai") == ("restarted", [("api", "nightly")])


def test_a_busy_service_is_skipped_with_the_reason_at_the_end_of_the_hour(night, store):
    reply = busy(1)

    assert night(first=reply) == ("", [])
    assert night(NIGHT + 45 * 60, first=reply) == ("busy", []), "the hour is over"
    assert [(row["kind"], row["outcome"], row["detail"]) for row in store.actions()] == [("nightly", "skipped", "busy")]


def test_a_young_process_and_one_that_did_not_grow_are_skipped(night, store):
    assert "5.0 h old" in night(age_s=5 * 3600)[0]
    store.execute(
        "INSERT INTO rollups (span, start, runs, words, sums) VALUES ('hour', ?, 60, '{}', '{\"api_rss_mib\": [60000.0, 60, 1000.0]}')",
        NIGHT + DAY_S - 2 * DAY_S,
    )  # fmt: skip

    outcome, restarts = night(NIGHT + DAY_S, rss_mib=1100.0)

    assert outcome == "not needed: memory grew from 1000 to 1100 MiB only" and restarts == []
    assert night(NIGHT + 2 * DAY_S, rss_mib=1300.0)[0] == "restarted"


def test_a_broken_service_is_left_to_the_restart_rules(night):
    outcome, restarts = night(answers=(replace(RIGHT[0], outcome="cut"), RIGHT[1]))

    assert outcome == "not healthy: broken" and restarts == []


def test_the_quiet_hour_has_the_least_pending_work_and_is_four_without_a_day_of_data(store, make_settings):
    settings = make_settings(1, nightly_restart="auto", timezone="UTC")
    start = datetime(2026, 11, 20, tzinfo=UTC)
    assert nightly.quiet_hour(store, settings, NIGHT) == 4

    for hour in range(24):
        load = 0.5 if hour == 14 else 7.0
        at = (start + timedelta(hours=hour)).timestamp()
        store.execute(
            "INSERT INTO rollups (span, start, runs, words, sums) VALUES ('hour', ?, 60, '{}', ?)", at, f'{{"pending": [{load * 60}, 60, 9]}}'
        )  # fmt: skip

    assert nightly.quiet_hour(store, settings, NIGHT) == 14
