"""A whole run of the check against servers that answer, misbehave or are not there."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import threading
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from models.shapes.pictures import COLORS, draw_shapes
from monitor import check
from monitor.observe import observe
from monitor.observe.observe import now
from monitor.observe.processes import ProcessRecord, boot_id, write_record
from monitor.observe.question import NAMES
from monitor.store.store import Store
from monitor.tell import status


def run_check(settings, rng) -> dict:
    return check.run(settings, rng).report


LOOKS_S = 2 + 2 + 4  # both looks at /health, and the page
SIX_KEYS = ["timestamp", "gpu_load", "gpu_memory_used", "cpu_percent", "memory_used_percent", "service_healthy"]


def seen(body: dict) -> str:
    """Looks at the picture the way a model would have to: which named colour covers most of it, in which form?"""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    color = max(COLORS, key=lambda name: int(painted(picture, name).sum()))
    form = outline(picture, color)
    shape = max(NAMES, key=lambda name: max(float((form == known).mean()) for known in known_outlines(name)))
    return f"{color} {shape}"


def painted(picture: Image.Image, color: str) -> np.ndarray:
    """Where a colour is the nearest of the named ones, and near: [height, width]."""
    pixels = np.asarray(picture.convert("RGB"), dtype=int)[:, :, None]
    distances = np.abs(pixels - np.array(list(COLORS.values()))).sum(axis=-1)
    return (distances.argmin(axis=-1) == list(COLORS).index(color)) & (distances.min(axis=-1) < 70)


def outline(picture: Image.Image, color: str) -> np.ndarray:
    """What has the colour, filling a square: [24, 24]."""
    where = Image.fromarray(painted(picture, color)).convert("L").filter(ImageFilter.MedianFilter(7))
    return np.asarray(where.crop(where.getbbox()).resize((24, 24))) > 127


@cache
def known_outlines(shape: str) -> list[np.ndarray]:
    return [outline(draw_shapes([("blue", shape)], size=(224, 224), seed=seed), "blue") for seed in range(30)]


@pytest.fixture(scope="module", autouse=True)
def outlines_known() -> None:
    learn_outlines()


def learn_outlines() -> None:
    """Before the first question: drawing them may take longer than a question may."""
    for name in NAMES:
        known_outlines(name)


def completion(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_right_answer_about_the_drawn_picture_is_healthy(service, behaviour, make_settings):
    behaviour.reply = lambda body: (200, completion(f"The shape is {seen(body)}."))

    reports = [run_check(make_settings(service, api_key="secret", probe_token="mark"), random.Random(seed)) for seed in range(3)]

    assert [report["verdict"] for report in reports] == ["healthy"] * 3
    assert all(report["service_healthy"] is True for report in reports)
    assert list(reports[0])[:6] == SIX_KEYS
    assert behaviour.keys == ["Bearer secret"] * 6, "a question without a picture and one with one, each time"
    assert behaviour.probe_tokens == ["mark"] * 6
    assert "secret" not in str(reports) and "mark'" not in str(reports)


def test_every_probe_asks_about_another_picture(service, behaviour, make_settings):
    for seed in range(4):
        run_check(make_settings(service), random.Random(seed))

    urls = {question["messages"][0]["content"][0]["image_url"]["url"] for question in behaviour.questions}
    assert len(urls) == len(behaviour.questions) >= 4


@pytest.mark.parametrize("answer", ["", "I cannot see pictures.", ", ".join(COLORS), "It is pink."])
def test_wrong_answer_is_broken_and_shown(service, behaviour, make_settings, answer):
    behaviour.reply = lambda body: (200, completion(answer))

    report = run_check(make_settings(service), random.Random(1))

    assert report["verdict"] == "broken"
    assert report["service_healthy"] is False
    assert answer in report["reasons"][0]


def test_one_slip_of_the_model_is_no_alarm_but_two_are(service, behaviour, make_settings):
    slips = iter([True, False, False, True, False, True])
    behaviour.reply = lambda body: (200, completion("pink" if next(slips) else seen(body)))

    verdicts = [run_check(make_settings(service), random.Random(seed))["verdict"] for seed in range(2)]

    assert verdicts == ["healthy", "broken"]
    assert next(slips, "none left") == "none left"



def test_hung_api_is_found_within_its_time_limit(hung, service, make_settings, monkeypatch):
    monkeypatch.setattr(observe, "SECOND_LOOK_LIMIT_S", 2.0)
    settings = make_settings(hung, web_port=service, probe_timeout_s=2)
    started = time.monotonic()

    report = run_check(settings, random.Random(1))

    assert time.monotonic() - started < settings.probe_timeout_s + LOOKS_S
    assert report["verdict"] == "zombie"
    assert report["service_healthy"] is False


def test_api_that_trickles_cannot_hold_the_check(trickling, service, make_settings, monkeypatch):
    monkeypatch.setattr(observe, "SECOND_LOOK_LIMIT_S", 2.0)
    settings = make_settings(trickling, web_port=service, probe_timeout_s=2)
    started = time.monotonic()

    report = run_check(settings, random.Random(1))

    assert time.monotonic() - started < settings.probe_timeout_s + LOOKS_S
    assert report["service_healthy"] is False


def test_nothing_listening_is_dead(make_settings):
    report = run_check(make_settings(1), random.Random(1))

    assert report["verdict"] == "dead"
    assert "Nothing listens" in report["reasons"][0]
    assert "no process was started here" in report["reasons"][0]


def test_dead_names_the_process_that_is_gone(make_settings):
    settings = make_settings(1)
    settings.log_dir.mkdir()
    write_record(settings.log_dir, "api", ProcessRecord(1, 1, 1, boot_id()))

    report = run_check(settings, random.Random(1))

    assert "The API process (pid 1) is gone." in report["reasons"]


def test_engine_that_stands_still_behind_a_good_health_answer_is_wedged(service, behaviour, make_settings):
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


def test_a_service_that_is_busy_for_long_warns_and_nothing_more(service, behaviour, make_settings):
    steps = iter(range(7, 1000))
    behaviour.health = lambda: (200, {"state": "busy", "steps": next(steps), "running": 1, "waiting": 9, "no_progress_s": 1.0})
    behaviour.reply = behaviour.text_reply = lambda body: (503, {"error": {"message": "The queue is full"}})
    settings, began = make_settings(service), now()
    reports = []
    for after_s in (0, 200, 310):
        moment = replace(began, wall=began.wall + after_s, monotonic=began.monotonic + after_s)
        reports.append(check.run(settings, random.Random(1), clock=lambda moment=moment: moment).report)

    assert [report["verdict"] for report in reports] == ["busy"] * 3
    told = [[warning["en"] for warning in report["warnings"] if warning["name"] == "busy_s"] for report in reports]
    assert told == [[], [], ["It has been too busy for the checker's question for 5 minutes or more."]]
    assert all(report["service_healthy"] for report in reports)


def test_refused_key_is_named_as_such(service, behaviour, make_settings):
    behaviour.reply = lambda body: (401, {"error": {"message": "missing or wrong API key"}})

    report = run_check(make_settings(service, api_key="old"), random.Random(1))

    assert report["verdict"] == "broken"
    assert "GLM_API_KEY" in report["reasons"][0]


def test_loading_is_starting_and_nothing_is_asked(service, behaviour, make_settings):
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


def test_page_that_does_not_answer_degrades_a_good_api(service, behaviour, make_settings):
    behaviour.reply = lambda body: (200, completion(seen(body)))
    behaviour.page_status = 500

    report = run_check(make_settings(service), random.Random(1))

    assert report["verdict"] == "degraded"
    assert report["service_healthy"] is False
    assert "The page does not answer: {}." in report["reasons"]


def test_page_that_was_not_started_is_not_missed(service, behaviour, make_settings):
    behaviour.reply = lambda body: (200, completion(seen(body)))
    settings = make_settings(service, web_port=1)
    settings.log_dir.mkdir()
    write_record(settings.log_dir, "api", ProcessRecord(1, 1, service, boot_id()))

    report = run_check(settings, random.Random(1))

    assert report["verdict"] == "healthy"
    assert report["evidence"]["page"] is None


def test_a_users_answer_stands_in_for_the_question_but_not_for_ever(service, behaviour, make_settings):
    behaviour.reply = lambda body: (200, completion(seen(body)))
    behaviour.health = lambda: (200, {"state": "idle", "steps": 7, "success_age_s": {"text": 5.0, "picture": 5.0}})
    settings = make_settings(service)
    first, second = (run_check(settings, random.Random(seed)) for seed in range(2))

    assert [answer["outcome"] for answer in first["evidence"]["api"]["answers"]] == ["right", "right"], "the first run asks"
    assert [answer["outcome"] for answer in second["evidence"]["api"]["answers"]] == ["credited", "credited"]
    assert second["verdict"] == "healthy" and len(behaviour.questions) == 1

    late = replace(now(), wall=time.time() + check.ASK_AT_LEAST_EVERY_S, monotonic=time.monotonic() + check.ASK_AT_LEAST_EVERY_S)
    check.run(settings, random.Random(3), clock=lambda: late)
    assert len(behaviour.questions) == 2, "users' answers are not checked for truth"


def test_the_way_through_the_reverse_proxy_is_looked_at_too(service, behaviour, make_settings):
    behaviour.reply = lambda body: (200, completion(seen(body)))

    good = run_check(make_settings(service, front_url=f"http://127.0.0.1:{service}/"), random.Random(1))
    bad = run_check(make_settings(service, front_url="http://127.0.0.1:1"), random.Random(1))

    assert good["verdict"] == "healthy" and good["evidence"]["page"]["front"]["status"] == 101
    assert (bad["verdict"], bad["targets"]["page"]["rule"]) == ("degraded", "front")
    assert bad["service_healthy"] is True


def test_a_disk_that_refuses_the_store_is_no_reason_to_tell_the_same_every_minute(service, behaviour, make_settings):
    """The runs share what they know in memory, so an incident is opened once."""
    settings = make_settings(1, web_port=service, webhook_url=f"http://127.0.0.1:{service}/v1/chat/completions")
    (settings.log_dir / "state.db").mkdir(parents=True)
    write_record(settings.log_dir, "api", ProcessRecord(4_000_000, 1, 1, boot_id()))

    reports = [run_check(settings, random.Random(seed)) for seed in range(3)]

    assert "kept in memory" in reports[0]["check"]["store"]
    assert len({report["targets"]["api"]["incident"] for report in reports}) == 1
    assert [report["check"]["run"] for report in reports] == [1, 2, 3]
    (settings.log_dir / "health.json").write_text(json.dumps({**reports[0], "timestamp": "2026-01-01T00:00:00+00:00"}))
    assert status.read(settings)[0]["check"]["run"] == 3, "a report that the disk did not take is shown"
    with contextlib.closing(Store.read_only(settings.log_dir)) as store:
        assert len(store.incidents()) == 1
        assert [row["kind"] for row in store.rows("SELECT kind FROM outbox")] == ["fire"]
