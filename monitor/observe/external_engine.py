"""The engine behind the API (GLM_ENGINE_URL), asked itself: progress from the Prometheus metrics of vLLM, SGLang or llama.cpp.

Their health routes answer 200 while the engine hangs. Pending requests while no token counter changes from run to run are
a hang. `EngineProgress` keeps the counters between runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from monitor.judge.evidence import EngineProgress, HealthReply
from monitor.observe import self_report
from monitor.observe.http_exchange import exchange, parse_json

clock = time.monotonic
Sample = tuple[str, Mapping[str, str], float]
RESPONSES = ("http_requests_total", "sglang:http_responses_total")  # the first is vLLM's, where 503 is not told from other 5xx
RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing", "glm_num_requests_running")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred", "glm_num_requests_waiting")
TOKENS = (
    "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:generation_tokens", "vllm:prompt_tokens",
    "vllm:iteration_tokens_total_count", "sglang:generation_tokens_total", "sglang:prompt_tokens_total",
    "sglang:gen_throughput", "glm_generation_tokens_total", "glm_prompt_tokens_total", "llamacpp:tokens_predicted_total", "llamacpp:prompt_tokens_total",
)
STATES = ("loading", "idle", "busy", "stalled", "draining", "dead")  # of an engine that is another API of this project  # fmt: skip


def get_health(base_url: str, limit_s: float, progress: EngineProgress, key: str) -> tuple[HealthReply, dict[str, Any]]:
    """The engine's state in the form of this project's /health, with the raw metrics as body. Updates `progress`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    health = exchange(f"{base_url}/health", limit_s, headers=headers)
    if health.outcome != "answered":
        return HealthReply(health.outcome, health.seconds, detail=health.detail), {}
    metrics = exchange(f"{base_url}/metrics", limit_s, headers=headers)
    # Without the last line, which may be cut off: an exchange reads a bounded part of the body.
    samples = read_samples(metrics.body.decode("utf-8", "replace").rpartition("\n")[0]) if metrics.status == 200 else []
    values = summed(samples)
    pending = _sum(values, RUNNING + WAITING)
    counters = {name: values[name] for name in TOKENS if name in values}
    now = clock()
    if counters != progress.counters:
        progress.counters, progress.still_since = counters, now
        progress.steps += 1
    elif not pending or progress.still_since is None:
        progress.still_since = now
    said = (health.json() or {}).get("state")
    state = "busy" if pending else "idle"
    if said in STATES:
        state = str(said)
    elif health.status == 503:
        # vLLM opens its port only once it has loaded: a 503 is the end of its engine.
        state = "dead" if any(name.startswith("vllm:") for name in values) else "loading"
    detail = "" if values else f"no metrics at /metrics (HTTP {metrics.status or 'none'}); progress is unknown"
    still_s = round(now - progress.still_since, 1) if pending and progress.still_since is not None else 0.0
    reply = HealthReply(
        "answered", health.seconds, health.status, state, "", progress.steps if values else None,
        None if pending is None else int(pending), still_s if values else None, None, None, "", detail,
    )  # fmt: skip
    known = outcomes(samples)
    if known is not None:
        reply = replace(reply, report=self_report.parse({"outcomes": known}))
    body: dict[str, Any] = {"metrics": {name: values[name] for name in (*RUNNING, *WAITING, *TOKENS) if name in values}}
    body["pending"] = reply.pending
    return reply, body if known is None else {**body, "outcomes": known}


def read_samples(text: str) -> list[Sample]:
    """Name, labels and value of each sample, without NaN. Empty if the text is not in Prometheus format."""
    # Imported only where there is an external engine.
    from prometheus_client.parser import text_string_to_metric_families

    try:
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text + "\n")
            for sample in family.samples
            if not math.isnan(sample.value)
        ]
    except ValueError:
        return []


def parse_metrics(text: str) -> dict[str, float]:
    """The sum of the samples of each name over all label sets."""
    return summed(read_samples(text))


def summed(samples: Iterable[Sample]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, _, value in samples:
        values[name] = values.get(name, 0.0) + value
    return values


def outcomes(samples: Iterable[Sample]) -> dict[str, Any] | None:
    """Requests answered and failed since the engine's start, in the form of this project's /health; None if it counts none.

    The checker's own questions are among them, because engines do not know them. Refusals for load and requests that their
    clients aborted are no failures.
    """
    answered, known = 0, False
    failed: dict[str, int] = {}
    for name, labels, value in samples:
        if name == "vllm:request_success_total":
            reason, known = labels.get("finished_reason", ""), True
            if reason in ("stop", "length", "repetition"):
                answered += int(value)
            elif reason == "error":
                failed["engine error"] = failed.get("engine error", 0) + int(value)
        elif name in RESPONSES and labels.get("handler", labels.get("endpoint", "")).startswith("/v1/"):
            status, known = labels.get("status", labels.get("status_code", "")), True
            if status.startswith("5") and status != "503":
                failed[f"HTTP {status}"] = failed.get(f"HTTP {status}", 0) + int(value)
            elif status.startswith("2") and name == "sglang:http_responses_total":
                answered += int(value)
    return {"answered": {"text": answered}, "failed": failed} if known else None


def model_key(base_url: str, key: str, limit_s: float) -> dict[str, str] | None:
    """What a baseline belongs to. Engines tell the model, and vLLM its folder or hub id; none tells what computes it."""
    reply = exchange(f"{base_url}/v1/models", limit_s, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        first = parse_json(reply.body)["data"][0]
        return {"model": str(first["id"]), "revision": str(first.get("root") or ""), "recipe": str(first.get("owned_by") or "")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _sum(values: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    known = [values[name] for name in names if name in values]
    return sum(known) if known else None
