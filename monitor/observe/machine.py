"""Processor, memory, disk, and what the server's process uses, each with the source it was read from. No GPU here.

What cannot be read is None with a reason, never 0.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import cgroup

CPU_INTERVAL_S = 0.5
MIB = 2**20
PROC = Path("/proc")


def read(pid: int | None = None, interval_s: float = CPU_INTERVAL_S, folders: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Evidence for the report. `pid` names the process whose container counts; the checker's own otherwise."""
    membership = PROC / str(pid) / "cgroup" if pid else cgroup.MEMBERSHIP
    waited_s, began = processor_wait_s(pid), time.monotonic()
    cpu = read_cpu(membership, interval_s)
    waited_after_s, took_s = processor_wait_s(pid), time.monotonic() - began
    starved = None if waited_s is None or waited_after_s is None else max(0.0, waited_after_s - waited_s) / took_s
    return {
        **cpu,
        **read_memory(membership),
        "load_per_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
        "cpu_pressure_percent": _pressure("cpu"),
        "oom_kills": cgroup.oom_kills(membership=membership),
        "disks": [read_disk(folder) for folder in folders],
        "process": {**read_process(pid), "waits_for_processor": None if starved is None else round(starved, 2)} if pid else None,
    }


def read_cpu(membership: Path = cgroup.MEMBERSHIP, interval_s: float = CPU_INTERVAL_S) -> dict[str, Any]:
    """Share of what may be used, over an interval: a first call without one always says 0.0."""
    before, started, ticks = cgroup.cpu(membership=membership), time.monotonic(), _host_ticks()
    time.sleep(interval_s)
    after, elapsed_s = cgroup.cpu(membership=membership), time.monotonic() - started
    if before is not None and after is not None:
        used = 100 * (after.used_s - before.used_s) / (elapsed_s * after.cores)
        return {"cpu_percent": round(used, 1), "cpu_source": f"control group, {after.cores:g} cores"}
    now = _host_ticks()
    total = now[1] - ticks[1]
    percent = round(100 * (now[0] - ticks[0]) / total, 1) if total > 0 else None
    return {"cpu_percent": percent, "cpu_source": f"host, {os.cpu_count()} cores"}


def _host_ticks() -> tuple[int, int]:
    """(busy, total) since boot; guest time is already in user time."""
    fields = [int(text) for text in (PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def read_memory(membership: Path = cgroup.MEMBERSHIP, root: Path = cgroup.ROOT) -> dict[str, Any]:
    total, available = _host_memory()
    group = cgroup.memory(total, root=root, membership=membership)
    if group is None:
        used_bytes, limit_bytes, source = total - available, total, "host"
    else:
        used_bytes, limit_bytes, source = group.used_bytes, group.limit_bytes, f"control group, {group.source}"
    return {
        "memory_used_percent": round(100 * used_bytes / limit_bytes, 1),
        "memory_used_bytes": used_bytes,
        "memory_limit_bytes": limit_bytes,
        "memory_source": source,
    }


def _host_memory() -> tuple[int, int]:
    lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return table["MemTotal"], table.get("MemAvailable", table["MemFree"])


def read_disk(folder: Path) -> dict[str, Any]:
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return {"path": str(folder), "free_mib": None, "used_percent": None, "reason": error.strerror}
    size = found.f_blocks * found.f_frsize
    return {
        "path": str(folder),
        "free_mib": round(found.f_bavail * found.f_frsize / MIB, 1),
        "used_percent": round(100 * (1 - found.f_bavail * found.f_frsize / size), 1) if size else None,
        "free_inodes_percent": round(100 * found.f_favail / found.f_files, 1) if found.f_files else None,
    }


def read_process(pid: int) -> dict[str, Any]:
    """Resident memory, open files and threads of one process."""
    try:
        status = (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
        table = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        limits = (PROC / str(pid) / "limits").read_text(encoding="ascii", errors="replace")
        most = next((line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")), "")
        return {
            "rss_mib": round(int(table["VmRSS"].split()[0]) / 1024, 1) if "VmRSS" in table else None,
            "threads": int(table["Threads"]),
            "open_files": len(os.listdir(PROC / str(pid) / "fd")),
            "open_files_limit": int(most) if most.isdigit() else None,
        }
    except (OSError, ValueError, KeyError) as error:
        return {"rss_mib": None, "open_files": None, "reason": f"{type(error).__name__}: {error}"}


def processor_wait_s(pid: int | None) -> float | None:
    """Seconds that the threads of a process were ready to run and got no processor, since they began."""
    try:
        threads = [path.read_text(encoding="ascii").split() for path in (PROC / str(pid) / "task").glob("*/schedstat")]
        return sum(int(fields[1]) for fields in threads) / 1e9 if threads else None
    except (OSError, ValueError, IndexError):
        return None


def _pressure(kind: str) -> float | None:
    """Share of the last minute in which somebody waited for a processor; None where the kernel does not tell."""
    try:
        first = (PROC / "pressure" / kind).read_text(encoding="ascii").splitlines()[0]
        return float(dict(pair.split("=") for pair in first.split()[1:])["avg60"])
    except (OSError, ValueError, KeyError, IndexError):
        return None
