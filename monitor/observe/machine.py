"""Processor, memory and disk of the machine, and the resources of the server's process. No GPU.

A value that cannot be read is None, never 0. psutil reads the host and the process, cgroup.py the limits of a container.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil

import cgroup

CPU_INTERVAL_S = 0.5
MIB = 2**20
PROC = Path("/proc")


def read(pid: int | None = None, interval_s: float = CPU_INTERVAL_S, folders: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Readings for the report; takes `interval_s`. `pid`: the process whose container counts (default: the checker's)."""
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
    """Percent of the usable processors, over `interval_s`."""
    before, started = cgroup.cpu(membership=membership), time.monotonic()
    psutil.cpu_percent()  # starts the interval of the next call
    time.sleep(interval_s)
    after, elapsed_s = cgroup.cpu(membership=membership), time.monotonic() - started
    if before is not None and after is not None:
        used = 100 * (after.used_s - before.used_s) / (elapsed_s * after.cores)
        return {"cpu_percent": round(used, 1), "cpu_source": f"control group, {after.cores:g} cores"}
    return {"cpu_percent": psutil.cpu_percent(), "cpu_source": f"host, {os.cpu_count()} cores"}


def read_memory(membership: Path = cgroup.MEMBERSHIP, root: Path = cgroup.ROOT) -> dict[str, Any]:
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
        process = psutil.Process(pid)
        soft_limit, _ = process.rlimit(psutil.RLIMIT_NOFILE)
        return {
            "rss_mib": round(process.memory_info().rss / MIB, 1),
            "threads": process.num_threads(),
            "open_files": process.num_fds(),
            "open_files_limit": None if soft_limit == psutil.RLIM_INFINITY else soft_limit,
        }
    except (psutil.Error, OSError) as error:
        return {"rss_mib": None, "open_files": None, "reason": f"{type(error).__name__}: {error}"}


def processor_wait_s(pid: int | None) -> float | None:
    """Total seconds that the threads of a process were runnable without a processor (schedstat)."""
    try:
        threads = [path.read_text(encoding="ascii").split() for path in (PROC / str(pid) / "task").glob("*/schedstat")]
        return sum(int(fields[1]) for fields in threads) / 1e9 if threads else None
    except (OSError, ValueError, IndexError):
        return None


def _pressure(kind: str) -> float | None:
    """Percent of the last minute in which some task was stalled (PSI); None if the kernel does not report it."""
    try:
        first = (PROC / "pressure" / kind).read_text(encoding="ascii").splitlines()[0]
        return float(dict(pair.split("=") for pair in first.split()[1:])["avg60"])
    except (OSError, ValueError, KeyError, IndexError):
        return None
