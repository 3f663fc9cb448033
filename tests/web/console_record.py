"""Writes a history with the checker's own store, so that the console reads what a checker writes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from monitor.store.store import Store

HEALTHY = {"word": "healthy", "rule": "answers_right", "en": "It answered rightly.", "zh": "回答正确。"}
WEDGED = {
    "word": "wedged", "rule": "stalled", "zh": "引擎 140 秒没有进展，仍有 3 个请求等待。",
    "en": "The engine has made no step for 140 s while 3 requests wait (limit 120 s).",
}  # fmt: skip
STARTING = {"word": "starting", "rule": "loading", "en": "The model is loading (43 %).", "zh": "模型正在加载（43%）。"}
CARD = {"name": "NVIDIA L40S", "memory_used_mib": 21000.0, "memory_total_mib": 46068.0, "temperature_c": 61}
INCIDENT: dict[str, Any] = {
    "id": "api-20261122-0310", "target": "api", **WEDGED, "opened_at": 0.0, "first_seen_at": 0.0, "recovered_at": None,
    "restarts": 1, "symptoms": [],
}  # fmt: skip


def record(
    log_dir: Path, now: float, hours: float, verdict_at: Callable[[float], dict[str, str] | None], step_s: float = 60.0
) -> None:
    """Writes a run every `step_s` up to `now`; `verdict_at(age_s)` is the API's verdict, None if the checker was off."""
    with closing(Store.open(log_dir)) as store, store.transaction():
        count = int(hours * 3600 / step_s)
        for n in range(count, -1, -1):
            at = now - n * step_s
            verdict = verdict_at(now - at)
            if verdict is not None:
                add_run(store, at, verdict)


def add_run(store: Store, at: float, verdict: dict[str, str]) -> None:
    good = verdict["word"] == "healthy"
    wave = abs((at / 3600 % 24) - 12) / 12  # 1 at midnight, 0 at noon
    readings = {
        "gpu_load": round(20 + 55 * (1 - wave), 1), "gpu_memory_used": 21000.0, "cpu_percent": round(12 + 10 * wave, 1),
        "memory_used_percent": 41.5, "pending": 3 if not good else round(2 * (1 - wave)), "page_s": 0.004,
        "picture_s": 0.8 + 0.3 * wave if good else None, "first_token_s": 0.21 + 0.1 * wave if good else None,
    }  # fmt: skip
    report = {"duration_s": 1.2, "verdict": verdict["word"], "service_healthy": good, "evidence": {"gpu": {"gpus": [CARD]}}}
    store.add_run(at, report, {"api": verdict, "page": HEALTHY}, readings)


def incident_of(now: float, begun_ago_s: float, ended_ago_s: float | None) -> dict[str, Any]:
    recovered = None if ended_ago_s is None else now - ended_ago_s
    begun = now - begun_ago_s
    return {**INCIDENT, "first_seen_at": begun, "opened_at": begun + 60, "recovered_at": recovered}
