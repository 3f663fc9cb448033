"""Whatever JSON an API or its heartbeat file holds: it is read without an error, judged, and can be written down."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from traces import RIGHT, RUNS, api

from monitor import check
from monitor.judge.api_rules import judge_api
from monitor.judge.evidence import ApiEvidence, Process
from monitor.judge.traffic import TrafficLog, add_run
from monitor.judge.verdict import SERVING, WORDS, Limits
from monitor.observe import health_probe, self_report
from monitor.observe.http_exchange import Reply
from monitor.observe.observe import now, read_heartbeat
from monitor.observe.processes import ProcessRecord, boot_id, read_stat, write_record
from monitor.tell import report

NUMBERS = st.one_of(
    st.integers(), st.just(10**400), st.floats(), st.sampled_from([-1, 0, 2**53, 2**53 + 1, -0.0, 1e308, float("inf"), float("nan"), True])
)
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["idle", "busy", "loading", "dead", "differs", "same", "xid", "\ud800", "x" * 5000, "\0"]))
LEAVES = st.one_of(st.none(), NUMBERS, TEXTS, st.lists(NUMBERS, max_size=3))
VALUES = st.one_of(LEAVES, st.dictionaries(TEXTS, LEAVES, max_size=3), st.lists(st.dictionaries(TEXTS, LEAVES, max_size=3), max_size=3))
KEYS = (
    "state", "phase", "steps", "running", "waiting", "no_progress_s", "phase_deadline_s", "progress", "reason", "success_age_s",
    "identity", "loading_still_s", "outcomes", "pace", "corrupt", "card_events", "proof",
)  # fmt: skip
INNER = {
    "identity": ("pid", "start_time", "boot_id", "version"), "outcomes": ("answered", "failed"), "pace": ("decode", "prefill", "vision"),
    "corrupt": ("nonfinite_total", "nonfinite_recent", "fingerprint", "fingerprint_stage", "fingerprint_age_s", "reference"),
}  # fmt: skip
BODIES = st.fixed_dictionaries(
    {"state": TEXTS},
    optional={
        key: st.one_of(VALUES, st.fixed_dictionaries({}, optional={name: VALUES for name in INNER[key]})) if key in INNER else VALUES
        for key in KEYS if key != "state"
    },
)
EVENTS = st.lists(st.fixed_dictionaries({"kind": TEXTS, "code": NUMBERS}, optional={"age_s": NUMBERS, "card": VALUES}), max_size=3)


def reply_of(body: object) -> health_probe.HealthReply:
    original, health_probe.exchange = health_probe.exchange, lambda *_: Reply("answered", 0.1, 200, json.dumps(body).encode())
    try:
        return health_probe.get_health("http://x", 1.0, "token")
    finally:
        health_probe.exchange = original


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.one_of(BODIES, VALUES), EVENTS)
def test_any_body_can_be_judged_and_written_down(body, events) -> None:
    if isinstance(body, dict):
        body = {**body, "card_events": events or body.get("card_events")}
    first = reply_of(body)
    traffic = add_run(TrafficLog("1 1 b"), first.report, now(), Limits())
    seen = api(first=first, last=first, traffic=traffic)

    verdict = judge_api(seen, Limits())

    assert verdict.word in WORDS
    assert judge_api(ApiEvidence.from_dict(seen.to_dict()), Limits()) == verdict
    report.to_json({"evidence": seen.to_dict(), "facts": verdict.facts, "en": verdict.en, "zh": verdict.zh}).encode()
    assert first.proven in (None, False), "nothing but the token makes a proof"


@hypothesis_settings(max_examples=150, deadline=None)
@given(BODIES, st.sampled_from(["gone", "stopped", "traced"]), st.sampled_from(["stranger", "nobody", "unknown", "ours"]), st.booleans())
def test_no_body_makes_a_process_healthy_that_cannot_answer(body, state, owner, proven) -> None:
    first = replace(reply_of(body), proven=proven)
    seen = api(process=Process(state, 4711, 9000.0, owner), first=first, last=first, answers=RIGHT)

    assert judge_api(seen, Limits()).word not in SERVING


@hypothesis_settings(max_examples=100, deadline=None)
@given(BODIES)
def test_no_body_makes_a_stranger_healthy(body) -> None:
    first = reply_of(body)
    seen = api(process=replace(RUNS, port_owner="stranger", holder="pid 9 (x)"), first=first, last=first)

    assert judge_api(seen, Limits()).rule == "port_taken"


@pytest.mark.parametrize("body", [b"[" * 900_000, b"1" * 900_000, b'{"state": "idle", "x": ' + b"[" * 900_000, b"\xff\xfe", b"null", b"3"])
def test_what_is_no_object_has_no_state(monkeypatch, body) -> None:
    monkeypatch.setattr(health_probe, "exchange", lambda *_: Reply("answered", 0.1, 200, body))

    assert health_probe.get_health("http://x", 1.0, "token").outcome == "failed"


def test_a_run_survives_a_hostile_answer(service, behaviour, make_settings) -> None:
    behaviour.health = lambda: (200, {
        "state": "idle\ud800", "steps": 10**300, "running": -4, "waiting": float("nan"), "success_age_s": {"text": "\ud800", "picture": -9},
        "identity": {"pid": -1}, "outcomes": {"answered": 5, "failed": {"\ud800": 10**40}}, "corrupt": [], "card_events": [[], {"kind": 5}],
        "pace": {"decode": {"1": [1, float("inf")]}, "prefill": "x"}, "proof": {"a": 1},
    })  # fmt: skip

    outcome = check.run(make_settings(service, probe_token="t"), random.Random(1))

    assert outcome.report["targets"]["api"]["word"] == "broken", "its answers are wrong"


def test_a_complete_report_is_read_completely() -> None:
    read = self_report.parse({
        "identity": {"pid": 5, "start_time": 6, "boot_id": "b", "version": "1"}, "loading_still_s": 1.5,
        "outcomes": {"answered": {"text": 10, "picture": 3}, "failed": {"engine": 2}},
        "pace": {"decode": {"1": [10, 0.5], "3-4": [2, 0.1]}, "prefill": [100, 0.2], "vision": [0, 0.0]},
        "corrupt": {"nonfinite_total": 4, "nonfinite_recent": 1, "fingerprint": "same", "fingerprint_stage": "", "fingerprint_age_s": None,
                    "reference": "differs", "reference_detail": "argmax"},
        "card_events": [{"kind": "xid", "code": 79, "card": 1, "age_s": 3.0}],
    })  # fmt: skip

    assert (read.identity.pid, read.identity.start_time, read.identity.boot_id, read.loading_still_s) == (5, 6, "b", 1.5)
    assert (read.outcomes.answered, read.outcomes.failed) == (13, {"engine": 2})
    assert read.pace == {"decode": {"1": [10, 0.5], "3-4": [2, 0.1]}, "prefill": [100, 0.2], "vision": [0, 0.0]}
    assert (read.corrupt.nonfinite_recent, read.corrupt.reference, read.corrupt.reference_detail) == (1, "differs", "argmax")
    assert [(event.code, event.card) for event in read.card_events] == [(79, 1)]


def beat_file(log_dir, **changes) -> None:
    clock = time.monotonic()
    body = {
        "pid": 1, "start_time": 1, "boot_id": boot_id(), "written_at": clock - 2, "beat_at": clock - 1, "state": "idle", "phase": "idle",
        "steps": 3, "running": 1, "waiting": 1, "no_progress_s": 0.5, "deadline_s": 120.0, "progress": 1.0, "loading_still_s": 7.0, **changes,
    }  # fmt: skip
    log_dir.mkdir(exist_ok=True)
    (log_dir / "api.heartbeat.json").write_text(json.dumps(body))


def test_a_heartbeat_is_read(tmp_path) -> None:
    beat_file(tmp_path)
    beat = read_heartbeat(tmp_path, None, now())

    assert beat is not None and 1 <= beat.beat_age_s < 2 < beat.written_age_s + 0.1
    assert (beat.pending, beat.report.loading_still_s) == (2, 7.0)


@pytest.mark.parametrize(
    "changes",
    [{"beat_at": 1e9}, {"written_at": 1e9}, {"beat_at": float("nan")}, {"written_at": float("inf")}, {"boot_id": "another"}, {"beat_at": "x"},
     {"beat_at": 10**400}, {"beat_at": None}],
)  # fmt: skip
def test_a_heartbeat_of_the_future_is_none(tmp_path, changes) -> None:
    beat_file(tmp_path, **changes)

    assert read_heartbeat(tmp_path, None, now()) is None


@pytest.mark.parametrize("text", ["", "[", "[" * 2_000_000, "null", "5", "[]", '{"boot_id": []}'])
def test_a_damaged_heartbeat_is_none(tmp_path, text) -> None:
    (tmp_path / "api.heartbeat.json").write_text(text)

    assert read_heartbeat(tmp_path, None, now()) is None


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["state", "steps", "running", "no_progress_s", "deadline_s", "progress", "outcomes", "corrupt"]), VALUES))
def test_any_heartbeat_is_read_or_refused(tmp_path_factory, changes) -> None:
    folder = tmp_path_factory.getbasetemp() / "beats"
    beat_file(folder, **changes)
    beat = read_heartbeat(folder, None, now())

    assert beat is None or (beat.beat_age_s >= 0 and beat.written_age_s >= 0 and beat.no_progress_s >= 0)


def test_a_heartbeat_of_the_future_does_not_keep_a_hung_api_from_its_cure(hung, service, make_settings, monkeypatch) -> None:
    """The process is this one, past its start."""
    monkeypatch.setattr("monitor.observe.observe.SECOND_LOOK_LIMIT_S", 0.5)
    monkeypatch.setattr("monitor.judge.api_rules.FRESH_PROCESS_S", 0.0)
    settings = make_settings(hung, web_port=service, probe_timeout_s=0.5)
    stat = read_stat(os.getpid())
    write_record(settings.log_dir, "api", ProcessRecord(stat.pid, stat.start_time, hung, boot_id()))
    beat_file(settings.log_dir, pid=stat.pid, start_time=stat.start_time, beat_at=1e9, written_at=1e9)
    began, reports = now(), []
    for after_s in (0, 60, 120):
        moment = replace(began, wall=began.wall + after_s, monotonic=began.monotonic + after_s)
        reports.append(check.run(settings, random.Random(1), clock=lambda moment=moment: moment).report)

    api_target = reports[-1]["targets"]["api"]
    assert (api_target["word"], api_target["rule"], api_target["decision"]["kind"]) == ("zombie", "loop_stands_still", "shadow")
