"""/tokenize and /detokenize, and /metrics: what operators and clients read besides answers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import picture_part, text_part


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


def test_text_becomes_tokens_and_tokens_become_text(serve) -> None:
    client = serve().client

    there = client.post("/tokenize", json={"prompt": "héllo <|user|>", "return_token_strs": True}).json()
    back = client.post("/detokenize", json={"tokens": there["tokens"]}).json()

    assert there["count"] == len(there["tokens"]) == len("héllo <|user|>".encode())
    assert there["max_model_len"] == 4096 and len(there["token_strs"]) == there["count"]
    assert back == {"prompt": "héllo <|user|>"}


def test_a_conversation_is_counted_as_the_engine_counts_it(serve) -> None:
    served = serve()
    messages = [{"role": "user", "content": "hello"}]

    counted = served.client.post("/tokenize", json={"messages": messages}).json()["count"]
    without = served.client.post(
        "/tokenize", json={"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    ).json()["count"]

    assert counted == served.chat("hello").json()["usage"]["prompt_tokens"] and without == counted + 3


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, ""),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, ""),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**70]}, "tokens[0]"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"model": "other", "tokens": []}, "model"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: str, body: dict[str, Any], param: str, serve) -> None:
    answer = serve().client.post(path, json=body)

    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_an_answer_is_counted_in_tokens_times_and_reasons(serve) -> None:
    served = serve()
    usage = served.chat([picture_part(), text_part("hi")]).json()["usage"]
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
                 "request_prefill_time", "request_decode_time"):  # fmt: skip
        assert of(found, f"{name}_seconds_count", traffic="user") == 2, name
    assert of(found, "request_time_per_output_token_seconds_count", traffic="user") == 2
    assert of(found, "engine_steps_total") > 2 and of(found, "engine_state", state="idle") == 1
    assert of(found, "build_info", version="0.1.0", model_name="fake") == 1
    assert of(found, "num_requests_running") == of(found, "num_requests_waiting") == 0


def test_probes_are_counted_apart(serve) -> None:
    served = serve(probe_token="pt")
    served.client.headers["x-glm-probe"] = "pt"
    served.chat("hi")

    found = samples(served)

    assert of(found, "request_success_total", finished_reason="stop", traffic="probe") == 1
    assert ("glm_request_success_total", (("finished_reason", "stop"), ("traffic", "user"))) not in found


def test_who_is_turned_away_is_counted_by_reason(serve) -> None:
    served = serve(key_requests_per_minute=1)
    statuses = [served.chat("hi").status_code for _ in range(3)]
    served.client.get("/nothing", headers={"Authorization": "none"})

    found = samples(served)

    assert statuses == [200, 429, 429]
    assert of(found, "admission_rejections_total", reason="rate_limit_exceeded", traffic="user") == 2
    assert of(found, "http_requests_total", method="POST", route="/v1/chat/completions", status="429") == 2
    assert of(found, "http_requests_total", method="other", route="other", status="401") == 1


def test_names_keep_to_the_customs(serve) -> None:
    served = serve()
    served.chat("hi")

    names = {name for name, _ in samples(served)}

    own = {name for name in names if not name.startswith(("process_", "python_"))}
    assert own and all(re.fullmatch(r"glm_[a-z0-9_]+", name) for name in own)
    assert {"glm_prefix_cache_hits_total", "glm_mm_cache_hits_total", "glm_kv_cache_usage_perc"} <= own
