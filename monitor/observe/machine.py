"""Processor, memory and disk of the machine, and the resources of the server's process. No GPU.

A value that cannot be read is None, never 0. psutil reads the host and the process, cgroup.py the limits of a container.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import cgroup
from monitor.observe import processes

CPU_INTERVAL_S = 0.5
SHORTEST_S = 0.4  # a shorter time is too coarse for the kernel's ticks of 10 ms
MIB = 2**20
PROC = Path("/proc")


def read(
    pid: int | None = None, interval_s: float = CPU_INTERVAL_S, folders: tuple[Path, ...] = (), before: Mapping[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Readings for the report; takes `interval_s`. `pid`: the process whose container counts (default: the checker's).

    `before`: the `counters` of the last run's readings; the processor is measured since then.
    """
    membership = PROC / str(pid) / "cgroup" if pid else cgroup.MEMBERSHIP
    waited_s, first = processor_wait_s(pid), read_counters(membership)
    time.sleep(interval_s)
    counters, waited_after_s = read_counters(membership), processor_wait_s(pid)
    took_s = counters["at"] - first["at"]
    starved = None if waited_s is None or waited_after_s is None else max(0.0, waited_after_s - waited_s) / took_s
    return {
        **cpu_use(before, counters, first),
        **read_memory(membership),
        "load_per_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
        "cpu_pressure_percent": _pressure("cpu"),
        "memory_pressure_percent": _pressure("memory"),
        "oom_kills": cgroup.oom_kills(membership=membership),
        "disks": [read_disk(folder) for folder in folders],
        "process": {**read_process(pid), "waits_for_processor": None if starved is None else round(starved, 2)} if pid else None,
        "name": machine_name(),
        "counters": counters,
    }


def read_counters(membership: Path = cgroup.MEMBERSHIP) -> dict[str, Any]:
    """Counters whose differences between two runs are rates. `own_s`: processor seconds of the checker itself.

    `at` is in seconds since the boot, time asleep included, which no clock setting changes.
    """
    budget = cgroup.cpu(membership=membership)
    busy_s, total_s, steal_s = _processor_times()
    counters: dict[str, Any] = {
        "boot_id": processes.boot_id(), "at": time.clock_gettime(time.CLOCK_BOOTTIME), "busy_s": busy_s, "total_s": total_s,
        "steal_s": steal_s, "own_s": own_s(), "own_pid": os.getpid(), "group": "",
    }  # fmt: skip
    if budget is not None and budget.folder is not None:
        counters |= {
            "group": str(budget.folder), "used_s": budget.used_s, "cores": budget.cores, "periods": budget.periods,
            "throttled_periods": budget.throttled_periods, "own_counts": cgroup.is_within(budget.folder),
        }  # fmt: skip
    return counters


def own_s() -> float:
    """Processor seconds of this process and of the children that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def cpu_use(before: Mapping[str, Any] | None, now: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """Percent of the usable processors between two readings, without the checker's own work.

    `first` was read shortly before `now`: it takes the place of `before` where that is not comparable.
    """
    why = _why_not_comparable(before, now)
    since = first if why or before is None else before
    elapsed_s = now["at"] - since["at"]
    # What the last run still did after its reading counts as the checker's own too.
    before_end_s = max(0.0, (since.get("own_end_s") or since["own_s"]) - since["own_s"]) if since["own_pid"] != now["own_pid"] else 0.0
    own = now["own_s"] - since["own_s"] if since["own_pid"] == now["own_pid"] else now["own_s"] + before_end_s
    period = f"over {elapsed_s:.0f} s" if not why else f"over {elapsed_s:.1f} s only: {why}"
    host_s = now["total_s"] - since["total_s"]
    result = {
        "cpu_percent": None, "cpu_source": "the kernel does not report it", "cpu_interval_s": round(elapsed_s, 1),
        "steal_percent": _percent(now["steal_s"] - since["steal_s"], host_s), "quota_cores": now.get("cores"),
        "throttled_percent": None,
    }  # fmt: skip
    if now["group"] and now["periods"] is not None and since.get("periods") is not None:
        stopped = now["throttled_periods"] - since["throttled_periods"]
        result["throttled_percent"] = _percent(stopped, now["periods"] - since["periods"])
    if now.get("used_s") is not None and since.get("used_s") is not None:
        own_in_group_s = own if now["own_counts"] else 0.0
        result["cpu_percent"] = _percent(now["used_s"] - since["used_s"] - own_in_group_s, elapsed_s * now["cores"])
        result["cpu_source"] = f"control group, {now['cores']:g} cores, {period}"
    elif host_s > 0:
        result["cpu_percent"] = _percent(now["busy_s"] - since["busy_s"] - own, host_s)
        result["cpu_source"] = f"host, {os.cpu_count()} cores, {period}"
    return result


def _why_not_comparable(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    if not before or not {"at", "boot_id", "own_s", "own_pid", "group", "total_s"} <= set(before):
        return "this is the first run"
    if before["boot_id"] != now["boot_id"]:
        return "the machine was started since the last run"
    if before["group"] != now["group"]:
        return "the control group has changed since the last run"
    backwards = any((now.get(name) or 0.0) < (before.get(name) or 0.0) for name in ("total_s", "busy_s", "used_s"))
    if backwards or now["at"] - before["at"] < SHORTEST_S:
        return "the last run's counters cannot be compared"
    return ""


def _percent(part: float, whole: float) -> float | None:
    return round(100 * min(1.0, max(0.0, part / whole)), 1) if whole > 0 else None


def _processor_times() -> tuple[float, float, float]:
    """(busy, all, stolen) processor seconds of the machine since its boot; waiting for a disk is not busy. Zeros if unreadable."""
    try:
        fields = (PROC / "stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        user, nice, system, idle, waiting, hard, soft, steal = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    except (OSError, ValueError, IndexError):
        return 0.0, 0.0, 0.0
    busy_s = user + nice + system + hard + soft + steal
    return busy_s, busy_s + idle + waiting, steal


@functools.cache
def machine_name() -> str:
    """The processor and the memory of this machine: what its speed depends on, and no limit that may be changed."""
    model = ""
    try:
        for line in (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "CPU part", "cpu model")):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model or platform.machine()}, {os.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB"


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
            "swapped_mib": _swapped_mib(pid),
            "threads": process.num_threads(),
            "open_files": process.num_fds(),
            "open_files_limit": None if soft_limit == psutil.RLIM_INFINITY else soft_limit,
        }
    except (psutil.Error, OSError) as error:
        return {"rss_mib": None, "open_files": None, "reason": f"{type(error).__name__}: {error}"}


def _swapped_mib(pid: int) -> float | None:
    try:
        for line in (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmSwap:"):
                return round(int(line.split()[1]) / 1024, 1)
    except (OSError, ValueError, IndexError):
        pass
    return None


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
