"""/metrics: what is counted and measured, and its documentation."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_model import fake_model
from prometheus_client.parser import text_string_to_metric_families
from served import image_part, text_part, wait_for

ROOT = Path(__file__).resolve().parents[3]


def samples(served: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = served.client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def of(found: dict, name: str, **labels: str) -> float:
    return found[(f"glm_{name}", tuple(sorted(labels.items())))]


def test_an_answer_is_counted_in_tokens_times_and_reasons(serve) -> None:
    served = serve()
    usage = served.chat([image_part(), text_part("hi")]).json()["usage"]
    served.chat("hi", max_tokens=2)
    served.chat("FAIL")

    found = samples(served)

    assert of(found, "request_success_total", finished_reason="stop", traffic="user") == 1
    assert of(found, "request_success_total", finished_reason="length", traffic="user") == 1
    assert of(found, "request_failure_total", reason="engine", traffic="user") == 1
    assert of(found, "generation_tokens_total", traffic="user") == usage["completion_tokens"] + 2
    assert of(found, "image_tokens_total", traffic="user") == usage["prompt_tokens_details"]["image_tokens"] > 0
    assert of(found, "images_total", traffic="user") == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_preprocess_time",
                 "request_prefill_time", "request_decode_time", "request_inference_time"):  # fmt: skip
        assert of(found, f"{name}_seconds_count", traffic="user") == 2, name
    assert of(found, "request_time_per_output_token_seconds_count", traffic="user") == 2
    assert of(found, "engine_steps_total") > 2 and of(found, "engine_state", state="idle") == 1
    assert of(found, "build_info", version="0.1.0", model_name="fake") == 1
    assert of(found, "num_requests_running") == of(found, "num_requests_waiting") == 0


def test_parameters_and_tokens_are_measured_as_they_arise(serve) -> None:
    served = serve(token_s=0.01)
    answer = served.chat("hi", n=2, max_tokens=7).json()

    found = samples(served)

    assert answer["usage"]["completion_tokens"] == 14
    for name, total in (("request_params_max_tokens", 7), ("request_params_n", 2), ("request_generation_tokens", 14),
                        ("request_prompt_tokens", answer["usage"]["prompt_tokens"])):  # fmt: skip
        assert (of(found, f"{name}_count", traffic="user"), of(found, f"{name}_sum", traffic="user")) == (1, total)
    # One token is one piece of text here; the first of each choice comes after nothing.
    assert of(found, "inter_token_latency_seconds_count", traffic="user") == 12
    assert 12 * 0.01 <= of(found, "inter_token_latency_seconds_sum", traffic="user") < 30
    assert of(found, "inter_token_latency_seconds_bucket", traffic="user", le="0.005") == 0
    assert time.time() - 60 < of(found, "engine_last_step_timestamp_seconds") <= time.time()
    assert of(found, "cache_config_info", slots="1", pages="512", page_tokens="16", chunk_tokens="4096",
              picture_cache_bytes="1000") == 1  # fmt: skip


def test_the_tokens_of_a_step_are_measured(serve) -> None:
    """One slot writes one token in a step, four slots four."""
    for slots in (1, 4):
        served = serve(slots=slots)
        served.chat("hi", n=slots, max_tokens=9)

        found = samples(served)

        steps, tokens = (of(found, f"iteration_tokens_total_{what}") for what in ("count", "sum"))
        assert tokens == 9 * slots
        assert tokens / steps == pytest.approx(slots, rel=0.25)


def test_a_failed_request_counts_the_tokens_it_generated(serve) -> None:
    served = serve()
    served.chat("FAIL")
    served.chat("hi", max_tokens=2)

    found = samples(served)

    assert of(found, "generation_tokens_total", traffic="user") == 2
    assert of(found, "request_params_n_count", traffic="user") == 2
    assert of(found, "request_generation_tokens_count", traffic="user") == 1


def test_probes_are_counted_apart(serve) -> None:
    served = serve(probe_token="pt")
    served.client.headers["x-glm-probe"] = "pt"
    served.chat("hi")

    found = samples(served)

    assert of(found, "request_success_total", finished_reason="stop", traffic="probe") == 1
    assert ("glm_request_success_total", (("finished_reason", "stop"), ("traffic", "user"))) not in found


def test_rejections_are_counted_by_reason(serve) -> None:
    served = serve(key_requests_per_minute=1)
    statuses = [served.chat("hi").status_code for _ in range(3)]
    served.client.get("/nothing", headers={"Authorization": "none"})

    found = samples(served)

    assert statuses == [200, 429, 429]
    assert of(found, "admission_rejections_total", reason="rate_limit_exceeded", traffic="user") == 2
    assert of(found, "http_requests_total", method="POST", route="/v1/chat/completions", status="429") == 2
    assert of(found, "http_requests_total", method="other", route="other", status="401") == 1


def test_names_follow_the_conventions(serve) -> None:
    served = serve()
    served.chat("hi")

    names = {name for name, _ in samples(served)}

    own = {name for name in names if not name.startswith(("process_", "python_"))}
    assert own and all(re.fullmatch(r"glm_[a-z0-9_]+", name) for name in own)
    assert {"glm_prefix_cache_hits_total", "glm_mm_cache_hits_total", "glm_kv_cache_usage_perc"} <= own


def test_the_documentation_lists_the_metrics(serve) -> None:
    served = serve()
    served.chat("hi")
    text = served.client.get("/metrics").text
    page = (ROOT / "docs" / "api.md").read_text("utf-8").split("## `GET /metrics`")[1].split("\n## ")[0]
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| `"))

    there = set(re.findall(r"^# TYPE glm_(\S+) ", text, re.MULTILINE))
    assert there == set(re.findall(r"`([a-z0-9_]+)(?:{[a-z_,]+})?`", rows))


PICKED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def test_the_endpoint_picker_finds_what_it_reads_under_vllms_names(serve) -> None:
    served = serve(metrics_names="vllm", slots=1, metrics_key="mk")
    asking = [threading.Thread(target=served.chat, args=(text,)) for text in ("HANG", "wait")]
    asking[0].start()
    assert served.runner.hanging.wait(30)
    asking[1].start()
    wait_for(lambda: served.engine.stats().waiting == 1)
    del served.client.headers["Authorization"]
    text = served.client.get("/metrics", headers={"Authorization": "Bearer mk"}).text

    found = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    model = (("model_name", "fake"),)
    assert [found[(f"vllm:{name}", model)] for name in PICKED[:2]] == [1, 1]
    assert all(found[(f"vllm:{name}", model)] == found[(f"glm_{name}", ())] for name in PICKED)
    assert 0 < found[("vllm:kv_cache_usage_perc", model)] == found[("vllm:gpu_cache_usage_perc", model)] <= 1
    assert found[("vllm:cache_config_info", (("block_size", "16"), *model, ("num_gpu_blocks", "512")))] == 1
    assert set(re.findall(r"^# TYPE (vllm:\S+) gauge$", text, re.MULTILINE)) == {
        *(f"vllm:{name}" for name in PICKED), "vllm:gpu_cache_usage_perc", "vllm:cache_config_info"
    }  # fmt: skip
    served.runner.release.set()
    for thread in asking:
        thread.join(30)


def test_vllms_names_are_there_only_on_request_and_before_the_model(serve) -> None:
    go = threading.Event()
    loading = serve(load=lambda progress: go.wait(30) and fake_model(), metrics_names="vllm")

    assert 'vllm:num_requests_waiting{model_name=""} 0.0' in loading.client.get("/metrics").text
    go.set()
    assert "vllm:" not in serve().client.get("/metrics").text
