"""An engine that the checker asks itself, with no API in front of it: metrics as vLLM and SGLang write them, from a stand-in that works and hangs."""

from __future__ import annotations

import io
import json
import random
import threading
import time
import types
from dataclasses import replace

import pytest
from stand_in_model import completion

from monitor import check
from monitor.judge.evidence import Answer, EngineProgress
from monitor.observe import api_probe, external_engine
from monitor.observe.http_exchange import LINE_LIMIT_BYTES, TooLong
from monitor.observe.observe import now
from monitor.observe.question import draw

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="glm"}} {running}.0
vllm:num_requests_waiting{{engine="0",model_name="glm"}} 0.0
vllm:prompt_tokens_total{{engine="0",model_name="glm"}} 1200.0
vllm:generation_tokens_total{{engine="0",model_name="glm"}} {tokens}.0
"""
SGLANG = """sglang:num_running_reqs{{model_name="glm"}} {running}
sglang:num_queue_reqs{{model_name="glm"}} 2
sglang:prompt_tokens_total{{model_name="glm"}} 8.128902e+06
sglang:generation_tokens_total{{model_name="glm"}} {tokens}
"""


@pytest.fixture
def engine(service, behaviour, describe, make_settings):
    """The stand-in as an external engine: /health answers 200 whatever happens, as theirs do."""
    behaviour.health = lambda: (200, {})
    behaviour.other["/health"] = (200, b"")
    behaviour.other["/v1/models"] = (200, b'{"data": [{"id": "glm"}]}')
    behaviour.reply = lambda body: (200, completion(describe(body)))
    settings = make_settings(1, engine_url=f"http://127.0.0.1:{service}", api_url=f"http://127.0.0.1:{service}", web_port=service, check_period_s=1, cure="restart")
    file = settings.log_dir / "baseline.json"
    key = {"model": "glm", "revision": "", "recipe": "", "engine": settings.engine_url}
    file.write_text(json.dumps({**json.loads(file.read_text()), "key": key}))
    return settings


def set_metrics(behaviour, text: str, running: int, tokens: int) -> None:
    behaviour.other["/metrics"] = (200, text.format(running=running, tokens=tokens).encode())


def test_an_engine_that_answers_is_healthy_and_gets_its_models_name(engine, behaviour):
    set_metrics(behaviour, VLLM, 0, 5000)

    report = check.run(engine, random.Random(1)).report

    assert report["verdict"] == "healthy"
    assert behaviour.questions[0]["model"] == "glm"


def test_an_engine_with_half_a_surrogate_in_its_words_is_judged(engine, behaviour):
    set_metrics(behaviour, VLLM, 0, 5000)
    behaviour.other["/v1/models"] = (200, b'{"data": [{"id": "\\ud800"}]}')
    behaviour.text_reply = behaviour.reply = lambda body: (200, completion("\ud800"))

    report = check.run(engine, random.Random(1)).report

    assert report["verdict"] != "unknown" and report["check"]["store"] == "ok"
    assert not list(engine.log_dir.glob("state.db.damaged*"))
    assert behaviour.questions[0]["model"] == "?"


@pytest.mark.parametrize("text", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_frozen_tokens_with_pending_requests_behind_a_good_health_answer_are_wedged(engine, behaviour, text, monkeypatch):
    released = threading.Event()
    behaviour.text_reply = behaviour.reply = lambda body: (released.wait(60), (503, {}))[1]
    engine = engine.model_copy(update={"probe_timeout_s": 1.0})
    set_metrics(behaviour, text, 3, 5000)
    first = check.run(engine, random.Random(1)).report

    monkeypatch.setattr(external_engine, "clock", lambda: time.monotonic() + 130)

    second = check.run(engine, random.Random(1)).report
    released.set()

    assert first["verdict"] == "busy", "within the time that a step may take"
    assert second["targets"]["api"]["rule"] == "no_progress"
    assert second["targets"]["api"]["decision"]["kind"] == "hold"
    assert "never restarted" in second["targets"]["api"]["decision"]["reason"]
    assert not (engine.log_dir / "incidents").exists(), "nothing is restarted"


@pytest.mark.parametrize("text", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_moving_tokens_are_busy(engine, behaviour, text, monkeypatch):
    tokens = iter(range(5000, 9000))
    behaviour.text_reply = behaviour.reply = lambda body: (set_metrics(behaviour, text, 3, next(tokens)), (503, {}))[1]
    set_metrics(behaviour, text, 3, 4999)
    check.run(engine, random.Random(1))

    monkeypatch.setattr(external_engine, "clock", lambda: time.monotonic() + 1000)

    assert check.run(engine, random.Random(1)).report["verdict"] == "busy"


def test_counters_are_summed_over_all_engines_of_a_server():
    text = 'a_total{engine="0"} 1\na_total{engine="1"} 2.5\nb 1e3\n# a_total 9\nc NaN\n'

    found = external_engine.parse_metrics(text)

    assert (found["a_total"], found["b"]) == (3.5, 1000.0)


VLLM_OUTCOMES = """vllm:request_success_total{finished_reason="stop",model_name="glm"} 90.0
vllm:request_success_total{finished_reason="length",model_name="glm"} 5.0
vllm:request_success_total{finished_reason="abort",model_name="glm"} 7.0
vllm:request_success_total{finished_reason="error",model_name="glm"} 3.0
http_requests_total{handler="/v1/chat/completions",method="POST",status="5xx"} 4.0
http_requests_total{handler="/health",method="GET",status="5xx"} 50.0
"""
SGLANG_OUTCOMES = """sglang:http_responses_total{endpoint="/v1/chat/completions",method="POST",status_code="200"} 40.0
sglang:http_responses_total{endpoint="/v1/chat/completions",method="POST",status_code="500"} 6.0
sglang:http_responses_total{endpoint="/v1/chat/completions",method="POST",status_code="503"} 9.0
sglang:http_responses_total{endpoint="/v1/chat/completions",method="POST",status_code="400"} 9.0
sglang:http_responses_total{endpoint="/metrics",method="GET",status_code="200"} 999.0
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VLLM_OUTCOMES, {"answered": {"text": 95}, "failed": {"engine error": 3, "HTTP 5xx": 4}}),
        (SGLANG_OUTCOMES, {"answered": {"text": 40}, "failed": {"HTTP 500": 6}}),
        ("a_total 1\n", None),
    ],
    ids=["vllm", "sglang", "neither"],
)
def test_failures_are_counted_without_load_aborts_and_bad_requests(text, expected):
    assert external_engine.outcomes(external_engine.read_samples(text)) == expected


def test_an_engine_that_answers_wrongly_is_told_and_never_restarted(engine, behaviour):
    set_metrics(behaviour, VLLM, 0, 5000)
    behaviour.reply = lambda body: (200, completion("It is pink."))

    reports = [check.run(engine, random.Random(seed)).report for seed in range(3)]

    api = reports[-1]["targets"]["api"]
    assert (api["word"], api["rule"], api["decision"]["kind"]) == ("broken", "accuracy_fell", "hold")
    assert "never restarted" in api["decision"]["reason"]


def test_an_engine_without_schemas_is_asked_in_plain_words(engine, behaviour, describe):
    set_metrics(behaviour, VLLM, 0, 5000)

    def refuse_schemas(body):
        if "response_format" in body:
            return 400, {"error": {"message": "response_format is not supported"}}
        return 200, completion(f"It is a {describe(body)} on a light blue background.")

    behaviour.reply = refuse_schemas

    report = check.run(engine, random.Random(1)).report

    assert report["targets"]["api"]["rule"] == "answers_right"
    assert ["response_format" in question for question in behaviour.questions[:2]] == [True, False]
    assert not any("response_format" in question for question in behaviour.questions[2:]), "refused once in a run"


def test_a_slow_engine_is_busy_while_it_moves_and_lost_the_question_when_it_is_idle(engine, behaviour):
    engine = engine.model_copy(update={"probe_timeout_s": 1.0})
    released, tokens = threading.Event(), iter(range(5000, 9000))
    behaviour.text_reply = behaviour.reply = lambda body: (set_metrics(behaviour, VLLM, 1, next(tokens)), released.wait(30), (503, {}))[2]
    set_metrics(behaviour, VLLM, 1, 4999)

    moving = check.run(engine, random.Random(1)).report
    behaviour.text_reply = behaviour.reply = lambda body: (released.wait(30), (503, {}))[1]
    set_metrics(behaviour, VLLM, 0, 6000)
    idle = check.run(engine, random.Random(1)).report
    released.set()

    assert moving["verdict"] == "busy"
    assert (idle["verdict"], idle["targets"]["api"]["rule"]) == ("broken", "lost_question")


@pytest.mark.parametrize(
    ("sent", "limit"), [(b"x", LINE_LIMIT_BYTES), (b"data: {}\n\n", api_probe.ANSWER_LIMIT_BYTES)], ids=["one line", "many events"]
)
def test_an_answer_without_end_is_bounded(sent, limit):
    ends = io.BytesIO(sent * (2 * limit // len(sent)))
    response = types.SimpleNamespace(status=200, readline=ends.readline)
    asked = draw("color", random.Random(1))

    with pytest.raises(TooLong):
        api_probe._read_answer(asked, response, time.monotonic())
    assert ends.tell() <= limit + 1, "bytes read"


def test_an_engine_that_only_thinks_is_asked_with_room_for_it(engine, behaviour, describe, monkeypatch):
    set_metrics(behaviour, VLLM, 0, 5000)
    sent = []

    def send(prober, asked, fields, limit_s):
        sent.append(fields["max_tokens"])
        thinks = Answer("text", "wrong", detail=api_probe.ONLY_THOUGHTS, tries=(("absent", False),), questions=1)
        return thinks if fields["max_tokens"] < 100 else replace(thinks, outcome="right", detail="", tries=(("absent", True),))

    monkeypatch.setattr(api_probe.Prober, "_send", send)

    answer = api_probe.Prober("http://x", "", "", random.Random(1))._ask(draw("absent", random.Random(1)), 5.0)

    assert sent == [48, 512] and answer.tries == (("absent", True),)


def test_progress_is_reset_by_a_reboot():
    old = EngineProgress({"x": 1.0}, 99.0, "boot-1", 4).to_dict()

    assert EngineProgress.from_dict(old, "boot-1") == EngineProgress({"x": 1.0}, 99.0, "boot-1", 4)
    assert EngineProgress.from_dict(old, "boot-2") == EngineProgress(boot_id="boot-2")
    assert replace(now(), boot_id="x").boot_id == "x"
