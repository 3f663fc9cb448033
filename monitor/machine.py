"""Processor and memory of the machine or container, each with the source it was read from. No GPU here."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from monitor import cgroup

CPU_INTERVAL_S = 0.5


def read(pid: int | None = None, interval_s: float = CPU_INTERVAL_S) -> dict:
    """Evidence for the report. `pid` names the process whose container counts; the checker's own otherwise."""
    membership = Path(f"/proc/{pid}/cgroup") if pid else cgroup.MEMBERSHIP
    return {**read_cpu(membership, interval_s), **read_memory(membership)}


def read_cpu(membership: Path = cgroup.MEMBERSHIP, interval_s: float = CPU_INTERVAL_S) -> dict:
    """Share of what may be used, over an interval: a first call without one always says 0.0."""
    before, started = cgroup.cpu(membership=membership), time.monotonic()
    host_percent = psutil.cpu_percent(interval=interval_s)
    after, elapsed_s = cgroup.cpu(membership=membership), time.monotonic() - started
    if before is None or after is None:
        return {"cpu_percent": host_percent, "cpu_source": f"host, {psutil.cpu_count()} cores"}
    used = 100 * (after.used_s - before.used_s) / (elapsed_s * after.cores)
    return {"cpu_percent": round(used, 1), "cpu_source": f"control group, {after.cores:g} cores"}


def read_memory(membership: Path = cgroup.MEMBERSHIP, root: Path = cgroup.ROOT) -> dict:
    host = psutil.virtual_memory()
    group = cgroup.memory(host.total, root=root, membership=membership)
    if group is None:
        used_bytes, limit_bytes, source = host.total - host.available, host.total, "host"
    else:
        used_bytes, limit_bytes, source = group.used_bytes, group.limit_bytes, f"control group, {group.source}"
    return {
        "memory_used_percent": round(100 * used_bytes / limit_bytes, 1),
        "memory_used_bytes": used_bytes,
        "memory_limit_bytes": limit_bytes,
        "memory_source": source,
    }
