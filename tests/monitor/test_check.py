"""Whole runs of the checker against servers that answer, misbehave or do not exist."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import threading
import time
from dataclasses import replace

import pytest
from stand_in_model import completion

from models.shapes.pictures import COLORS
from monitor import check
from monitor.judge.verdict import Verdict
from monitor.observe import api_probe, observe, unit
from monitor.observe.observe import now
from monitor.observe.processes import ProcessRecord, boot_id, read_stat, write_record
from monitor.store.state import CheckerState
from monitor.store.store import Store
from monitor.tell import status


def run_check(settings, rng) -> dict:
    return check.run(settings, rng).report


def this_process(port: int) -> ProcessRecord:
    """The stand-in's process as start.sh would record it."""
    stat = read_stat(os.getpid())
    assert stat is not None
    return ProcessRecord(stat.pid, stat.start_time, port, boot_id())


OTHER_PROBES_S = 2 + 2 + 4  # /health twice, and the page
SIX_KEYS = ["timestamp", "gpu_load", "gpu_memory_used", "cpu_percent", "memory_used_percent", "service_healthy"]


def test_right_answer_about_the_drawn_image_is_healthy(service, behaviour, describe, make_settings):
    behaviour.reply = lambda body: (200, completion(f"The shape is {describe(body)}."))

    reports = [run_check(make_settings(service, api_key="secret", probe_token="mark"), random.Random(seed)) for seed in range(3)]

    assert [report["verdict"] for report in reports] == ["healthy"] * 3
    assert all(report["service_healthy"] is True for report in reports)
    assert list(reports[0])[:6] == SIX_KEYS
    assert behaviour.keys == ["Bearer secret"] * 9, "a question without a picture and two with one, each time"
    assert behaviour.probe_tokens == ["mark"] * 9
    assert "secret" not in str(reports) and "mark'" not in str(reports)


def test_every_probe_asks_about_a_different_image(service, behaviour, make_settings):
    for seed in range(4):
        run_check(make_settings(service), random.Random(seed))

    urls = {question["messages"][0]["content"][0]["image_url"]["url"] for question in behaviour.questions}
    assert len(urls) == len(behaviour.questions) >= 4


@pytest.mark.parametrize("answer", ["I cannot see pictures.", ", ".join(COLORS), "It is pink."])
def test_answers_that_are_always_wrong_have_fallen_within_the_run(service, behaviour, make_settings, answer):
    behaviour.reply = lambda body: (200, completion(answer))

    report = run_check(make_settings(service), random.Random(1))

    assert (report["verdict"], report["targets"]["api"]["rule"]) == ("broken", "accuracy_fell")
    assert report["service_healthy"] is False
    assert re.search(r"color: 0 of \d+ right now, 100% in the baseline", report["reasons"][0])
    assert report["evidence"]["api"]["answers"][1]["text"].strip() == answer


def test_an_empty_answer_is_a_failure(service, behaviour, make_settings):
    behaviour.reply = lambda body: (200, completion(""))

    assert run_check(make_settings(service), random.Random(1))["targets"]["api"]["rule"] == "picture_failed"


def test_a_wrong_answer_among_right_ones_is_healthy_and_shown(service, behaviour, describe, make_settings):
    slips = iter([True])
    behaviour.reply = lambda body: (200, completion("pink" if next(slips, False) else describe(body)))

    report = run_check(make_settings(service), random.Random(1))

    assert (report["verdict"], report["targets"]["api"]["rule"]) == ("healthy", "answers_mostly_right")
    assert "got 'pink" in report["targets"]["api"]["en"]
    assert len(behaviour.questions) > 2, "a wrong answer makes it ask more"


def test_without_a_baseline_no_answer_is_wrong(service, behaviour, make_settings):
    behaviour.reply = lambda body: (200, completion("It is pink."))
    settings = make_settings(service)
    (settings.log_dir / "baseline.json").unlink()

    reports = [run_check(settings, random.Random(seed)) for seed in range(3)]

    assert {report["verdict"] for report in reports} == {"degraded"}
    assert reports[-1]["targets"]["api"]["rule"] == "never_right"
    assert reports[-1]["targets"]["api"]["decision"]["kind"] == "none"


def test_the_baseline_is_taken_only_while_nobody_else_is_answered(service, behaviour, describe, make_settings, monkeypatch):
    monkeypatch.setattr(api_probe, "EXTRA_S", 120.0)  # so that a loaded machine asks as many questions
    monkeypatch.setattr(api_probe, "REFINE_S", 0.0)
    behaviour.reply = lambda body: (200, completion(describe(body)))
    behaviour.health = lambda: (200, {"state": "busy", "steps": 7, "running": 1, "waiting": 0, "no_progress_s": 0.1})
    settings = make_settings(service, probe_timeout_s=240.0)  # half of which a baseline may take
    (settings.log_dir / "baseline.json").unlink()

    run_check(settings, random.Random(1))

    assert len(behaviour.questions) == 1
    behaviour.health = lambda: (200, {"state": "idle", "steps": 7})
    run_check(settings, random.Random(2))
    taken = json.loads((settings.log_dir / "baseline.json").read_text())
    assert taken["kinds"]["color"] == {"asked": 20, "right": 20, "later_asked": 0, "later_right": 0, "sure": True}
    assert taken["kinds"]["absent"]["right"] == 20 and not taken["kinds"]["arithmetic"]["sure"]


def test_another_model_gets_a_baseline_of_its_own(service, behaviour, describe, make_settings):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    behaviour.other["/info"] = (200, json.dumps({"model": "other", "revision": "r2", "device": "cpu", "dtype": "float32"}).encode())
    settings = make_settings(service)

    run_check(settings, random.Random(1))

    taken = json.loads((settings.log_dir / "baseline.json").read_text())
    assert taken["key"] == {"model": "other", "revision": "r2", "recipe": "cpu/float32"}
    assert taken["kinds"]["color"]["asked"] + taken["kinds"]["color"]["later_asked"] < 200, "that of the stand-in is not used"


def test_hung_api_is_detected_within_its_time_limit(hung, service, make_settings, monkeypatch):
    monkeypatch.setattr(observe, "SECOND_LOOK_LIMIT_S", 1.0)
    settings = make_settings(hung, web_port=service, probe_timeout_s=1)
    started = time.monotonic()

    report = run_check(settings, random.Random(1))

    assert time.monotonic() - started < settings.probe_timeout_s + OTHER_PROBES_S
    assert report["verdict"] == "zombie"
    assert report["service_healthy"] is False


def test_api_that_trickles_does_not_delay_the_run(trickling, service, make_settings, monkeypatch):
    monkeypatch.setattr(observe, "SECOND_LOOK_LIMIT_S", 1.0)
    settings = make_settings(trickling, web_port=service, probe_timeout_s=1)
    started = time.monotonic()

    report = run_check(settings, random.Random(1))

    assert time.monotonic() - started < settings.probe_timeout_s + OTHER_PROBES_S
    assert report["service_healthy"] is False


def test_a_health_reply_with_half_a_surrogate_in_every_text_is_judged(service, behaviour, describe, make_settings):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    texts = dict.fromkeys(("state", "phase", "reason", "proof", "model", "\ud800"), "\ud800x")
    behaviour.health = lambda: (200, {**texts, "identity": {"pid": 1, "start_time": 1, "boot_id": "\ud800x", "version": "\ud800"}})
    settings = make_settings(service, web_port=service)

    for _ in range(2):
        report = run_check(settings, random.Random(1))

        assert report["targets"]["api"]["word"] != "unknown" and report["check"]["store"] == "ok"
    assert not list(settings.log_dir.glob("state.db.damaged*"))


def test_nothing_listening_is_dead(make_settings):
    report = run_check(make_settings(1), random.Random(1))

    assert report["verdict"] == "dead"
    assert "Nothing listens" in report["reasons"][0]
    assert "no process was started here" in report["reasons"][0]


def test_dead_names_the_missing_process(make_settings):
    settings = make_settings(1)
    settings.log_dir.mkdir(exist_ok=True)
    write_record(settings.log_dir, "api", ProcessRecord(1, 1, 1, boot_id()))

    report = run_check(settings, random.Random(1))

    assert "The API process (pid 1) is gone." in report["reasons"]


def test_stalled_engine_is_wedged(service, behaviour, make_settings):
    released = threading.Event()
    behaviour.health = lambda: (503, {"state": "stalled", "steps": 7, "running": 1, "waiting": 0, "no_progress_s": 130.0})
    behaviour.reply = lambda body: (released.wait(30), (200, completion("late")))[1]

    report = run_check(make_settings(service), random.Random(1))
    released.set()

    assert report["verdict"] == "wedged"
    assert report["service_healthy"] is False


def test_slow_engine_that_makes_steps_is_busy_and_not_unhealthy(service, behaviour, make_settings):
    released, steps = threading.Event(), iter(range(7, 1000))
    behaviour.health = lambda: (200, {"state": "busy", "steps": next(steps), "running": 1, "waiting": 0, "no_progress_s": 1.0})
    behaviour.reply = lambda body: (released.wait(30), (200, completion("late")))[1]

    report = run_check(make_settings(service, probe_timeout_s=1), random.Random(1))
    released.set()

    assert report["verdict"] == "busy"
    assert report["service_healthy"] is True


def test_a_service_that_is_busy_for_long_only_warns(service, behaviour, make_settings):
    steps = iter(range(7, 1000))
    behaviour.health = lambda: (200, {"state": "busy", "steps": next(steps), "running": 1, "waiting": 9, "no_progress_s": 1.0})
    behaviour.reply = behaviour.text_reply = lambda body: (503, {"error": {"message": "The queue is full"}})
    settings, began = make_settings(service), now()
    reports = []
    for after_s in (0, 200, 310):
        moment = replace(began, wall=began.wall + after_s, monotonic=began.monotonic + after_s)
        reports.append(check.run(settings, random.Random(1), clock=lambda moment=moment: moment).report)

    assert [report["verdict"] for report in reports] == ["busy"] * 3
    warnings = [[warning["en"] for warning in report["warnings"] if warning["name"] == "busy_s"] for report in reports]
    assert warnings == [[], [], ["It has been too busy for the checker's question for 5 minutes or more."]]
    assert all(report["service_healthy"] for report in reports)


def test_rejected_key_is_reported(service, behaviour, make_settings):
    behaviour.reply = lambda body: (401, {"error": {"message": "missing or wrong API key"}})

    report = run_check(make_settings(service, api_key="old"), random.Random(1))

    assert report["verdict"] == "broken"
    assert "GLM_API_KEY" in report["reasons"][0]


def test_loading_is_starting_and_no_question_is_sent(service, behaviour, make_settings):
    behaviour.health = lambda: (503, {"state": "loading", "progress": 0.25})

    report = run_check(make_settings(service), random.Random(1))

    assert report["verdict"] == "starting"
    assert "25 %" in report["reasons"][0]
    assert behaviour.questions == []


def test_server_error_is_broken_with_its_message(service, behaviour, make_settings):
    behaviour.reply = lambda body: (500, {"error": {"message": "CUDA error: device-side assert"}})

    report = run_check(make_settings(service), random.Random(1))

    assert report["verdict"] == "broken"
    assert "device-side assert" in report["reasons"][0]


def test_page_that_does_not_answer_degrades_a_good_api(service, behaviour, describe, make_settings):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    behaviour.page_status = 500

    report = run_check(make_settings(service), random.Random(1))

    assert report["verdict"] == "degraded"
    assert report["service_healthy"] is False
    assert "The page does not answer: {}." in report["reasons"]


def test_page_that_was_not_started_is_not_expected(service, behaviour, describe, make_settings):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    settings = make_settings(service, web_port=1)
    settings.log_dir.mkdir(exist_ok=True)
    write_record(settings.log_dir, "api", this_process(service))

    report = run_check(settings, random.Random(1))

    assert report["verdict"] == "healthy"
    assert report["evidence"]["page"] is None


def test_the_page_is_probed_through_the_reverse_proxy(service, behaviour, describe, make_settings):
    behaviour.reply = lambda body: (200, completion(describe(body)))

    good = run_check(make_settings(service, front_url=f"http://127.0.0.1:{service}/"), random.Random(1))
    bad = run_check(make_settings(service, front_url="http://127.0.0.1:1"), random.Random(1))

    assert good["verdict"] == "healthy" and good["evidence"]["page"]["front"]["status"] == 101
    assert (bad["verdict"], bad["targets"]["page"]["rule"]) == ("degraded", "front")
    assert bad["service_healthy"] is True


def test_a_disk_that_refuses_the_store_does_not_repeat_alerts(service, behaviour, make_settings):
    """The runs share a store in memory, so the incident is opened once."""
    settings = make_settings(1, web_port=service, webhook_url=f"http://127.0.0.1:{service}/v1/chat/completions")
    (settings.log_dir / "state.db").symlink_to("missing/state.db")
    write_record(settings.log_dir, "api", ProcessRecord(4_000_000, 1, 1, boot_id()))

    reports = [run_check(settings, random.Random(seed)) for seed in range(3)]

    assert "kept in memory" in reports[0]["check"]["store"]
    assert len({report["targets"]["api"]["incident"] for report in reports}) == 1
    assert [report["check"]["run"] for report in reports] == [1, 2, 3]
    (settings.log_dir / "health.json").write_text(json.dumps({**reports[0], "timestamp": "2026-01-01T00:00:00+00:00"}))
    assert status.read(settings)[0]["check"]["run"] == 3, "a report that is in memory only is shown"
    with contextlib.closing(Store.read_only(settings.log_dir)) as store:
        assert len(store.incidents()) == 1
        assert [row["kind"] for row in store.rows("SELECT kind FROM outbox")] == ["fire"]


def test_a_new_token_of_the_page_is_named_and_restarts_nothing(service, behaviour, describe, make_settings):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    behaviour.page_token = "old"
    settings, began = make_settings(service, web_token="new"), now()
    reports = []
    for after_s in (0, 60, 120, 180):
        moment = replace(began, wall=began.wall + after_s, monotonic=began.monotonic + after_s)
        reports.append(check.run(settings, random.Random(1), clock=lambda moment=moment: moment).report)

    page = reports[-1]["targets"]["page"]
    assert (page["word"], page["rule"], page["decision"]["kind"]) == ("broken", "token_refused", "none")
    assert "GLM_WEB_TOKEN" in page["en"] and page["incident"]

    behaviour.page_token = "new"
    assert run_check(settings, random.Random(1))["targets"]["page"]["word"] == "healthy"


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ({"api": "refused", "status": 401, "address": "127.0.0.1:8080"}, "page_key_refused"),
        ({"api": "unreachable", "status": 0, "address": "127.0.0.1:9"}, "page_cannot_reach_api"),
    ],
)
def test_a_page_whose_own_questions_fail_is_told_and_restarts_nothing(service, behaviour, describe, make_settings, said, rule):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    behaviour.other["/_stcore/api-contact"] = (200, json.dumps(said).encode())
    settings, began = make_settings(service), now()
    reports = []
    for after_s in (0, 60, 120):
        moment = replace(began, wall=began.wall + after_s, monotonic=began.monotonic + after_s)
        reports.append(check.run(settings, random.Random(1), clock=lambda moment=moment: moment).report)

    page = reports[-1]["targets"]["page"]
    assert (page["word"], page["rule"], page["decision"]["kind"]) == ("broken", rule, "none")
    assert reports[0]["service_healthy"] is False, "told at once"
    assert page["incident"] and said["address"] in page["en"] and "./start.sh --restart web" in page["zh"]

    del behaviour.other["/_stcore/api-contact"]  # as a page of an earlier version
    assert run_check(settings, random.Random(1))["targets"]["page"]["rule"] == "page_answers"


@pytest.mark.parametrize(
    ("target", "word", "left_to_systemd"),
    [("api", "dead", True), ("api", "wedged", True), ("api", "zombie", True), ("page", "dead", True), ("page", "zombie", False), ("api", "broken", False)],
)
def test_what_systemd_restarts_by_itself_is_left_to_it(target, word, left_to_systemd, monkeypatch):
    verdict = Verdict(target, word, "rule", "en", "zh", {}, "", cure=True)
    assert check.systemd_restarts(target, verdict) == "", "no systemd owns the servers here"
    monkeypatch.setattr(unit, "owner_of", lambda part: unit.NAMES[part])
    monkeypatch.setattr(unit, "state_of", lambda name: "activating")

    why = check.systemd_restarts(target, verdict)
    monkeypatch.setattr(unit, "state_of", lambda name: "failed")
    given_up = check.systemd_restarts(target, verdict)

    assert bool(why) == bool(given_up) == left_to_systemd
    assert not why or ("systemd owns glm-" in why and "systemctl reset-failed glm-" in given_up)


def test_a_dead_server_that_systemd_owns_is_held_and_not_restarted(make_settings, monkeypatch):
    monkeypatch.setattr(unit, "owner_of", lambda part: unit.NAMES[part])
    monkeypatch.setattr(unit, "state_of", lambda name: "activating")
    settings = make_settings(1, cure="restart")
    dead = Verdict("api", "dead", "process_gone", "en", "zh", {}, "", cure=True, needed=0)
    state = CheckerState.load(Store.open(settings.log_dir), "")

    decisions = check._decide(state, {"api": dead}, settings, 1e9, "")

    assert (decisions["api"].kind, decisions["api"].reason.split(",")[0]) == ("hold", "systemd owns glm-api.service")
    monkeypatch.setattr(unit, "owner_of", lambda part: "")
    assert check._decide(state, {"api": dead}, settings, 1e9, "")["api"].kind == "restart"
