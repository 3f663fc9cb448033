"""Prometheus metrics with vLLM's names after the prefix `glm_`. The label `traffic` separates probes from users.

Counters of the engine are read at each scrape, so measuring costs the engine nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from api import __version__
from api.engine.serving import ServingEngine
from api.engine.stats import Stats

disable_created_metrics()  # they double the output, and only give the time at which this process began to count
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_LABELS = 100  # values of a label that callers can choose
STATES = ("loading", "idle", "busy", "draining", "dead")
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TPOT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Labels whose names differ from the fields of Capacity.
CAPACITY_LABELS = {"encoder_cache_bytes": "picture_cache_bytes"}
_STAGES = {
    "queue_s": ("request_queue_time_seconds", "Waiting for the engine."),
    "preprocess_s": (
        "request_preprocess_time_seconds",
        "Fetching, decoding and processing images, and the template.",
    ),
    "prefill_s": ("request_prefill_time_seconds", "From the engine's start on a request to its first token."),
    "decode_s": ("request_decode_time_seconds", "From the first token to the last."),
}


class AdmissionLoad(NamedTuple):
    """Admitted requests, their tokens, and the bytes of bodies that are still arriving."""

    requests: int
    tokens: int
    arriving_bytes: int


class Metrics:
    """Thread-safe. `admission` and `loop_lag_s` are called at each scrape."""

    def __init__(self, engine: ServingEngine, admission: Callable[[], AdmissionLoad], loop_lag_s: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_EngineCollector(engine, admission, loop_lag_s))
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS)
        self._tpot = self._histogram("request_time_per_output_token_seconds", "After the first one.", _TPOT_BUCKETS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _E2E_BUCKETS)
        self._stages = {
            key: self._histogram(name, description, _TTFT_BUCKETS) for key, (name, description) in _STAGES.items()
        }
        self._inference = self._histogram(
            "request_inference_time_seconds", "From the engine's start on a request to its last token.", _E2E_BUCKETS
        )
        self._vision = self._histogram(
            "request_vision_encode_time_seconds", "In the vision encoder, where an image was new.", _TTFT_BUCKETS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between one piece of an answer's text and the next.", _TPOT_BUCKETS
        )
        self._iteration = Histogram(
            "glm_iteration_tokens_total",
            "Written in one step of the engine.",
            registry=self.registry,
            buckets=_BATCH_BUCKETS,
        )
        self._prompt_size = self._histogram("request_prompt_tokens", "Of one prompt, images included.", _TOKEN_BUCKETS)
        self._answer_size = self._histogram("request_generation_tokens", "Of one request's answers.", _TOKEN_BUCKETS)
        self._max_tokens = self._histogram("request_params_max_tokens", "The longest answer allowed.", _TOKEN_BUCKETS)
        self._choices = self._histogram("request_params_n", "Answers asked for.", (1, 2, 4, 8))
        self._prompt = self._counter("prompt_tokens", "Tokens read, images included.", "traffic")
        self._cached = self._counter("prompt_tokens_cached", "Of those, found in the prefix cache.", "traffic")
        self._image_tokens = self._counter("image_tokens", "Of those, of images.", "traffic")
        self._images = self._counter("images", "Images accepted.", "traffic")
        self._generated = self._counter("generation_tokens", "Tokens written, as they come.", "traffic")
        self._success = self._counter(
            "request_success", "Answers, by the reason of their end.", "finished_reason", "traffic"
        )
        self._failure = self._counter("request_failure", "Accepted requests without an answer.", "reason", "traffic")
        self._rejections = self._counter(
            "admission_rejections", "Requests turned away before work.", "reason", "traffic"
        )
        self._ignored = self._counter("ignored_fields", "Fields of accepted requests that had no effect.", "field")
        self._ignored_labels: set[str] = set()
        self._http = self._counter("http_requests", "Every request.", "method", "route", "status")
        # Looked up once, not at every token.
        self._of_tokens = {
            probe: (self._generated.labels(_traffic(probe)), self._itl.labels(_traffic(probe))) for probe in (False, True)
        }

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def submitted(self, longest: int, choices: int, probe: bool) -> None:
        self._max_tokens.labels(_traffic(probe)).observe(longest)
        self._choices.labels(_traffic(probe)).observe(choices)

    def step(self, texts: list[tuple[int, float | None, bool]]) -> None:
        """The pieces of text that a step of the engine has written: tokens, seconds after the piece before, whether for a
        probe."""
        tokens = {False: 0, True: 0}
        for count, gap_s, probe in texts:
            tokens[probe] += count
            if gap_s is not None:
                self._of_tokens[probe][1].observe(gap_s)
        for probe, count in tokens.items():
            if count:
                self._of_tokens[probe][0].inc(count)
        self._iteration.observe(sum(tokens.values()))

    def answered(
        self, usage: dict[str, Any], timings: dict[str, float], reasons: list[str], images: int, probe: bool
    ) -> None:
        """A request has succeeded; `reasons` are its choices' finish reasons."""
        traffic = _traffic(probe)
        self._ttft.labels(traffic).observe(timings["ttft_s"])
        self._e2e.labels(traffic).observe(timings["total_s"])
        if timings["tpot_s"]:
            self._tpot.labels(traffic).observe(timings["tpot_s"])
        if timings["vision_s"]:
            self._vision.labels(traffic).observe(timings["vision_s"])
        for key, histogram in self._stages.items():
            histogram.labels(traffic).observe(timings[key])
        self._inference.labels(traffic).observe(timings["prefill_s"] + timings["decode_s"])
        self._prompt_size.labels(traffic).observe(usage["prompt_tokens"])
        self._answer_size.labels(traffic).observe(usage["completion_tokens"])
        self._prompt.labels(traffic).inc(usage["prompt_tokens"])
        self._cached.labels(traffic).inc(usage["prompt_tokens_details"]["cached_tokens"])
        self._image_tokens.labels(traffic).inc(usage["prompt_tokens_details"]["image_tokens"])
        self._images.labels(traffic).inc(images)
        for reason in reasons:
            self._success.labels(reason, traffic).inc()

    def failed(self, reason: str, probe: bool) -> None:
        self._failure.labels(reason, _traffic(probe)).inc()

    def rejected(self, reason: str, probe: bool) -> None:
        self._rejections.labels(reason, _traffic(probe)).inc()

    def ignored(self, names: list[str]) -> None:
        """Count fields by name. Callers invent names, so those after the first MAX_LABELS are counted as `other`."""
        for name in names:
            if len(self._ignored_labels) < MAX_LABELS:
                self._ignored_labels.add(name)
            self._ignored.labels(name if name in self._ignored_labels else "other").inc()

    def http(self, method: str, route: str, status: int) -> None:
        self._http.labels(method, route, str(status)).inc()

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"glm_{name}", description, ["traffic"], registry=self.registry, buckets=buckets)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"glm_{name}", description, labels, registry=self.registry)


class _EngineCollector:
    """Reads the engine's own counters at each scrape."""

    def __init__(self, engine: ServingEngine, admission: Callable[[], AdmissionLoad], loop_lag_s: Callable[[], float]) -> None:
        self._engine = engine
        self._admission = admission
        self._loop_lag_s = loop_lag_s

    def collect(self) -> Iterator[Any]:
        stats, model = self._engine.stats(), self._engine.model
        for name, description, value in _gauges(stats, self._admission()):
            yield GaugeMetricFamily(f"glm_{name}", description, value=value)
        lag_s = self._loop_lag_s()
        yield GaugeMetricFamily("glm_event_loop_lag_seconds", "How late the event loop beats.", value=lag_s)
        for name, description, count in _counts(stats, self._engine.guard_report()["nonfinite_total"]):
            yield CounterMetricFamily(f"glm_{name}", description, value=count)
        yield from _pace(self._engine.pace.totals())
        state = GaugeMetricFamily("glm_engine_state", "1 for the state that the engine is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(stats.state == name))
        yield state
        build = GaugeMetricFamily("glm_build_info", "What runs.", labels=["version", "model_name"])
        build.add_metric([__version__, model.id if model else ""], 1)
        yield build
        if model is not None and model.capacity is not None:
            sizes = {CAPACITY_LABELS.get(k, k): str(size) for k, size in asdict(model.capacity).items()}
            cache = GaugeMetricFamily("glm_cache_config_info", "How the engine's memory is cut.", labels=list(sizes))
            cache.add_metric(list(sizes.values()), 1)
            yield cache


def _gauges(stats: Stats, admission: AdmissionLoad) -> list[tuple[str, str, float]]:
    gauges = [
        ("num_requests_running", "In the engine's slots.", float(stats.running)),
        ("num_requests_waiting", "In the engine's queue.", float(stats.waiting)),
        ("num_requests_admitted", "Under way, from before their images are decoded.", float(admission.requests)),
        (
            "body_bytes_arriving",
            "Of request bodies that are still arriving and hold no permit yet.",
            float(admission.arriving_bytes),
        ),
        ("num_tokens_admitted", "Of prompts and longest answers under way.", float(admission.tokens)),
        ("num_slots", "Requests the engine runs at once.", float(stats.slots)),
        ("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", stats.kv_usage),
        ("kv_cache_used_tokens", "Tokens with keys and values in memory.", float(stats.kv_used_tokens)),
        ("engine_phase_age_seconds", "How long the present phase has lasted.", stats.phase_age_s),
        ("load_progress", "Of loading the model, 0 to 1.", stats.progress),
    ]
    if stats.last_step_age_s is not None:
        ended_at = time.time() - stats.last_step_age_s
        gauges.append(("engine_last_step_timestamp_seconds", "When the last step ended, in Unix time.", ended_at))
    return gauges


def _counts(stats: Stats, nonfinite: int) -> list[tuple[str, str, int]]:
    return [
        ("engine_steps", "Units of work done.", stats.steps),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
        ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_cache_hits),
        ("mm_cache_queries", "Images looked up in the encoder cache.", stats.encoder_cache_queries),
        ("mm_cache_hits", "Images found there.", stats.encoder_cache_hits),
        ("num_preemptions", "Requests put back to make room.", stats.preemptions),
        ("engine_nonfinite", "Requests ended because their logits were not finite.", nonfinite),
    ]


def _pace(totals: dict[str, Any]) -> Iterator[CounterMetricFamily]:
    """Work and the seconds that it took: the rate of one over the rate of the other is the engine's pace."""
    steps = CounterMetricFamily("glm_engine_decode_steps", "Steps that only decoded, by their rows.", labels=["rows"])
    seconds = CounterMetricFamily("glm_engine_decode_seconds", "What those steps took.", labels=["rows"])
    for rows, (count, took_s) in totals["decode"].items():
        steps.add_metric([rows], count)
        seconds.add_metric([rows], took_s)
    yield from (steps, seconds)
    for name, units, description in (
        ("prefill", "tokens", "Prompt tokens computed, without those from the prefix cache."),
        ("vision", "patches", "Patches of encoded images."),
    ):
        count, took_s = totals[name]
        yield CounterMetricFamily(f"glm_engine_{name}_{units}", description, value=count)
        yield CounterMetricFamily(f"glm_engine_{name}_seconds", f"What the steps of {name} took.", value=took_s)


def _traffic(probe: bool) -> str:
    return "probe" if probe else "user"
