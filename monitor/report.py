"""The report that people and machines read: six keys at the top, the evidence below. Standard library only.

Owns the shape of the JSON and the atomic write. Never NaN: a number that is none becomes null.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

SCHEMA_VERSION = 1
FILE_NAME = "health.json"


def build(
    verdict: str, serving: bool | None, reasons: list[str], machine: dict, gpu: dict, evidence: dict, duration_s: float
) -> dict:
    """`gpu` carries load_percent and memory_used_mib of the busiest and the fullest card; null with `reason`."""
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu_load": gpu.get("load_percent"),
        "gpu_memory_used": gpu.get("memory_used_mib"),
        "cpu_percent": machine.get("cpu_percent"),
        "memory_used_percent": machine.get("memory_used_percent"),
        "service_healthy": serving,
        "verdict": verdict,
        "reasons": reasons,
        "evidence": {"machine": machine, "gpu": gpu, **evidence},
        "duration_s": round(duration_s, 2),
        "schema_version": SCHEMA_VERSION,
    }


def unknown(reason: str) -> dict:
    """The report of a check that could not look: it does not know, and says so."""
    return build("unknown", None, [reason], {}, {}, {}, 0.0)


def to_json(report: dict) -> str:
    return json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)


def write(report: dict, log_dir: Path) -> Path:
    """Replace health.json in one step: a reader sees the old report or the new one, never half of one."""
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / FILE_NAME
    descriptor, temporary = tempfile.mkstemp(dir=log_dir, prefix=f".{FILE_NAME}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(to_json(report) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
