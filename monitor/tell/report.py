"""The JSON report: six fixed keys at the top, the evidence below. NaN and infinity become null. Standard library only."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
FILE_NAME = "health.json"


def build(
    verdict: str,
    serving: bool | None,
    reasons: list[str],
    machine: Mapping[str, Any],
    gpu: Mapping[str, Any],
    evidence: Mapping[str, Any],
    duration_s: float,
    at: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """`gpu` has the highest load_percent and memory_used_mib of all cards, null with a `reason`. `at` is wall-clock seconds.

    `more` adds the top-level keys targets, warnings and check.
    """
    moment = datetime.fromtimestamp(at, UTC) if at is not None else datetime.now(UTC)
    return {
        "timestamp": moment.isoformat(timespec="seconds"),
        "gpu_load": gpu.get("load_percent"),
        "gpu_memory_used": gpu.get("memory_used_mib"),
        "cpu_percent": machine.get("cpu_percent"),
        "memory_used_percent": machine.get("memory_used_percent"),
        "service_healthy": serving,
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict,
        "reasons": reasons,
        **more,
        "evidence": {"machine": dict(machine), "gpu": dict(gpu), **evidence},
        "duration_s": round(duration_s, 2),
    }


def unknown(reason: str) -> dict[str, Any]:
    """The report of a run that could not observe anything."""
    return build("unknown", None, [reason], {}, {}, {}, 0.0)


def to_json(report: Mapping[str, Any], indent: int | None = 2) -> str:
    return json.dumps(finite(report), indent=indent, ensure_ascii=False, allow_nan=False)


def write(report: Mapping[str, Any], log_dir: Path) -> Path:
    """Replaces health.json atomically. Raises OSError."""
    path = log_dir / FILE_NAME
    replace_file(path, to_json(report) + "\n")
    return path


def replace_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes a temporary file and renames it, so that readers never see a partial file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
