"""Another OpenAI-compatible server in the API's place: progress read from the metrics of vLLM or SGLang.

Such a server says 200 while it hangs, so its word is not taken: pending requests whose token counters stand still
from run to run are a hang, wherever they wait. The counters of the last look are kept between runs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from monitor.judge.evidence import Look
from monitor.observe.exchange import exchange

clock = time.monotonic
METRIC = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{[^}]*\})?\s+([0-9.eE+-]+|NaN|\+?Inf)", re.MULTILINE)
RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "glm_num_requests_running")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "glm_num_requests_waiting")
TOKENS = (
    "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:generation_tokens", "vllm:prompt_tokens",
    "vllm:iteration_tokens_total_count", "sglang:generation_tokens_total", "sglang:prompt_tokens_total",
    "sglang:gen_throughput", "glm_generation_tokens_total", "glm_prompt_tokens_total",
)  # fmt: skip


@dataclass
class Memory:
    """Token counters at the last look, and since when (CLOCK_MONOTONIC) they have not moved while work was pending."""

    counters: dict[str, float] = field(default_factory=dict)
    still_since: float | None = None
    boot_id: str = ""
    steps: int = 0


def look(base_url: str, limit_s: float, memory: Memory, key: str) -> tuple[Look, dict[str, Any]]:
    """One look as if the engine had our own /health; updates `memory`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    health = exchange(f"{base_url}/health", limit_s, headers=headers)
    if health.outcome != "answered":
        return Look(health.outcome, health.seconds, detail=health.detail), {}
    metrics = exchange(f"{base_url}/metrics", limit_s, headers=headers)
    values = parse(metrics.body.decode("utf-8", "replace")) if metrics.status == 200 else {}
    pending = _sum(values, RUNNING + WAITING)
    counters = {name: values[name] for name in TOKENS if name in values}
    now = clock()
    if counters != memory.counters:
        memory.counters, memory.still_since = counters, now
        memory.steps += 1
    elif not pending or memory.still_since is None:
        memory.still_since = now
    state = "busy" if pending else "idle"
    if health.status == 503:
        state = "loading"
    detail = "" if values else f"no metrics at /metrics (HTTP {metrics.status or 'none'}); progress cannot be seen"
    still_s = round(now - memory.still_since, 1) if pending and memory.still_since is not None else 0.0
    found = Look(
        "answered", health.seconds, health.status, state, "", memory.steps if values else None,
        None if pending is None else int(pending), still_s if values else None, None, None, "", detail,
    )  # fmt: skip
    return found, {"metrics": {name: values[name] for name in (*RUNNING, *WAITING, *TOKENS) if name in values}}


def parse(text: str) -> dict[str, float]:
    """Prometheus text to name -> sum over all label sets."""
    found: dict[str, float] = {}
    for name, value in METRIC.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def model_name(base_url: str, key: str) -> str:
    """Other servers insist on the model's name; empty where they do not tell it."""
    reply = exchange(f"{base_url}/v1/models", 2.0, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        return str(json.loads(reply.body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


def to_dict(memory: Memory) -> dict[str, Any]:
    return vars(memory)


def from_dict(raw: Mapping[str, Any], boot_id: str) -> Memory:
    """After a reboot the monotonic clock starts anew, so nothing that was counted still holds."""
    if not raw or raw.get("boot_id") != boot_id:
        return Memory(boot_id=boot_id)
    return Memory(**{name: raw[name] for name in Memory.__dataclass_fields__ if name in raw})


def _sum(values: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    known = [values[name] for name in names if name in values]
    return sum(known) if known else None
