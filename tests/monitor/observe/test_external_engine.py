"""An external engine: metrics as vLLM and SGLang write them, from a stand-in that works and hangs."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
from stand_in_model import completion

from monitor import check
from monitor.judge.evidence import EngineProgress
from monitor.observe import external_engine
from monitor.observe.observe import now

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
    return make_settings(
        1, engine_url=f"http://127.0.0.1:{service}", web_port=service, check_period_s=1, cure="restart"
    )


def set_metrics(behaviour, text: str, running: int, tokens: int) -> None:
    behaviour.other["/metrics"] = (200, text.format(running=running, tokens=tokens).encode())


def test_an_engine_that_answers_is_healthy_and_gets_its_models_name(engine, behaviour):
    set_metrics(behaviour, VLLM, 0, 5000)

    report = check.run(engine, random.Random(1)).report

    assert report["verdict"] == "healthy"
    assert behaviour.questions[0]["model"] == "glm"


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


def test_progress_is_reset_by_a_reboot():
    old = EngineProgress({"x": 1.0}, 99.0, "boot-1", 4).to_dict()

    assert EngineProgress.from_dict(old, "boot-1") == EngineProgress({"x": 1.0}, 99.0, "boot-1", 4)
    assert EngineProgress.from_dict(old, "boot-2") == EngineProgress(boot_id="boot-2")
    assert replace(now(), boot_id="x").boot_id == "x"
