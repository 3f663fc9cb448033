"""What Kubernetes' endpoint picker reads of a model server, under the names that vLLM gives it: the numbers are those of ours.

There are no adapters here, so `vllm:lora_requests_info` is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily

from api.engine.serving import ServingEngine


class VllmCollector:
    """Reads the engine's own counters at each scrape."""

    def __init__(self, engine: ServingEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats, model = self._engine.stats(), self._engine.model
        labels = {"model_name": model.id if model else ""}
        for name, description, value in (
            ("num_requests_running", "In the engine's slots.", stats.running),
            ("num_requests_waiting", "In the engine's queue.", stats.waiting),
            ("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", stats.kv_usage),
            ("gpu_cache_usage_perc", "The older name of vllm:kv_cache_usage_perc.", stats.kv_usage),
        ):
            yield _gauge(name, description, labels, value)
        if model is not None and model.capacity is not None:
            sizes = {"block_size": str(model.capacity.page_tokens), "num_gpu_blocks": str(model.capacity.pages)}
            yield _gauge("cache_config_info", "How the KV cache is cut.", {**labels, **sizes}, 1)


def _gauge(name: str, description: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"vllm:{name}", description, labels=list(labels))
    gauge.add_metric(list(labels.values()), value)
    return gauge
