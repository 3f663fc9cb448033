"""An external engine in place of the API (GLM_ENGINE_URL): progress from the Prometheus metrics of vLLM or SGLang.

Their health routes answer 200 while the engine hangs. Pending requests while no token counter changes from run to run are
a hang. `EngineProgress` keeps the counters between runs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from monitor.judge.evidence import EngineProgress, HealthReply
from monitor.observe.http_exchange import exchange

clock = time.monotonic
RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "glm_num_requests_running")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "glm_num_requests_waiting")
TOKENS = (
    "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:generation_tokens", "vllm:prompt_tokens",
    "vllm:iteration_tokens_total_count", "sglang:generation_tokens_total", "sglang:prompt_tokens_total",
    "sglang:gen_throughput", "glm_generation_tokens_total", "glm_prompt_tokens_total",
)  # fmt: skip


def get_health(base_url: str, limit_s: float, progress: EngineProgress, key: str) -> tuple[HealthReply, dict[str, Any]]:
    """The engine's state in the form of this project's /health, with the raw metrics as body. Updates `progress`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    health = exchange(f"{base_url}/health", limit_s, headers=headers)
    if health.outcome != "answered":
        return HealthReply(health.outcome, health.seconds, detail=health.detail), {}
    metrics = exchange(f"{base_url}/metrics", limit_s, headers=headers)
    values = parse_metrics(metrics.body.decode("utf-8", "replace")) if metrics.status == 200 else {}
    pending = _sum(values, RUNNING + WAITING)
    counters = {name: values[name] for name in TOKENS if name in values}
    now = clock()
    if counters != progress.counters:
        progress.counters, progress.still_since = counters, now
        progress.steps += 1
    elif not pending or progress.still_since is None:
        progress.still_since = now
    state = "busy" if pending else "idle"
    if health.status == 503:
        state = "loading"
    detail = "" if values else f"no metrics at /metrics (HTTP {metrics.status or 'none'}); progress is unknown"
    still_s = round(now - progress.still_since, 1) if pending and progress.still_since is not None else 0.0
    reply = HealthReply(
        "answered", health.seconds, health.status, state, "", progress.steps if values else None,
        None if pending is None else int(pending), still_s if values else None, None, None, "", detail,
    )  # fmt: skip
    return reply, {"metrics": {name: values[name] for name in (*RUNNING, *WAITING, *TOKENS) if name in values}}


def parse_metrics(text: str) -> dict[str, float]:
    """Sums the samples of each name over all label sets, without NaN. Empty if the text is not in Prometheus format."""
    # Imported only where there is an external engine.
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not math.isnan(sample.value):
                    values[sample.name] = values.get(sample.name, 0.0) + sample.value
    except ValueError:
        return {}
    return values


def model_key(base_url: str, key: str, limit_s: float) -> dict[str, str] | None:
    """What a baseline belongs to. Engines tell the model, and vLLM its folder or hub id; none tells what computes it."""
    reply = exchange(f"{base_url}/v1/models", limit_s, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        first = json.loads(reply.body)["data"][0]
        return {"model": str(first["id"]), "revision": str(first.get("root") or ""), "recipe": str(first.get("owned_by") or "")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _sum(values: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    known = [values[name] for name in names if name in values]
    return sum(known) if known else None
