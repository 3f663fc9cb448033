"""Key figures from the API's metrics in the Prometheus text format. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class ApiMetrics:
    """None where the API exports no such metric or has served no request yet.

    `kv_used`: share of the KV cache, 0 to 1. `tokens_per_s`: of one answer after its first token, mean since the API's
    start. `reused`: share of the prompt tokens that came from the prefix cache. Of several replicas these are means.
    """

    kv_used: float | None = None
    tokens_per_s: float | None = None
    reused: float | None = None


def parse(*texts: str) -> ApiMetrics:
    """One text, or one of each replica. Counts user traffic only, not the checker's requests. Text in any other format gives no figures."""
    values: dict[str, float] = {}
    kv_used: list[float] = []
    try:
        for family in (family for text in texts for family in text_string_to_metric_families(text)):
            for sample in family.samples:
                if sample.labels in ({}, {"traffic": "user"}):
                    values[sample.name] = values.get(sample.name, 0.0) + sample.value
                    if sample.name == "glm_kv_cache_usage_perc":
                        kv_used.append(sample.value)
    except ValueError:
        return ApiMetrics()
    return ApiMetrics(
        kv_used=sum(kv_used) / len(kv_used) if kv_used else None,
        tokens_per_s=_ratio(
            values, "glm_request_time_per_output_token_seconds_count", "glm_request_time_per_output_token_seconds_sum"
        ),
        reused=_ratio(values, "glm_prompt_tokens_cached_total", "glm_prompt_tokens_total"),
    )


def _ratio(values: Mapping[str, float], numerator: str, denominator: str) -> float | None:
    return values.get(numerator, 0.0) / values[denominator] if values.get(denominator) else None
