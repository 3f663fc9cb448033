"""Limits and usage of the control group of a process, versions 1 and 2.

The server sizes its caches and threads by it; the checker reports it. In nested groups the lowest limit on the way up
applies. The functions return None where no limit is set, in which case the host's numbers apply. They only read files, so
any thread may call them. Source: the kernel's admin-guide/cgroup-v2 and admin-guide/cgroup-v1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryUse:
    """`used_bytes` excludes inactive file cache, which the kernel reclaims before it kills a process."""

    used_bytes: int
    limit_bytes: int
    source: str


@dataclass(frozen=True)
class CpuBudget:
    """Processor seconds that the group has used, None where they are accounted elsewhere, and the most cores that it may use.

    `periods`: enforcement periods in which it wanted to run, and in how many of them it was stopped; None if not reported.
    """

    used_s: float | None
    cores: float
    periods: int | None = None
    throttled_periods: int | None = None
    folder: Path | None = field(default=None, compare=False)


def memory(host_total_bytes: int, root: Path = ROOT, membership: Path = MEMBERSHIP) -> MemoryUse | None:
    """The lowest memory limit of the process's groups; None if none is below the host's memory."""
    if _is_version_2(root):
        folders = _folders(root, membership, "")
        limit_name, used_name, cache_key = "memory.max", "memory.current", "inactive_file"
    else:
        folders = _folders(root / "memory", membership, "memory")
        limit_name, used_name, cache_key = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    lowest: MemoryUse | None = None
    for folder in folders:
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        # Version 1 represents "no limit" as a huge number.
        if limit is None or used is None or limit >= host_total_bytes:
            continue
        if lowest is None or limit < lowest.limit_bytes:
            cache = _keyed(folder / "memory.stat").get(cache_key, 0)
            lowest = MemoryUse(max(0, used - cache), limit, str(folder / limit_name))
    return lowest


def cpu(root: Path = ROOT, membership: Path = MEMBERSHIP) -> CpuBudget | None:
    """The lowest processor quota of the process's groups; None if there is none."""
    lowest: CpuBudget | None = None
    if _is_version_2(root):
        for folder in _folders(root, membership, ""):
            cores = _quota_2(folder / "cpu.max")
            stat = _keyed(folder / "cpu.stat")
            used_us = stat.get("usage_usec")
            if cores is not None and used_us is not None and (lowest is None or cores < lowest.cores):
                lowest = CpuBudget(used_us / 1e6, cores, stat.get("nr_periods"), stat.get("nr_throttled"), folder)
        return lowest
    for folder in _folders(root / "cpu", membership, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        used_ns = _number(root / "cpuacct" / folder.relative_to(root / "cpu") / "cpuacct.usage")
        if quota is None or quota <= 0 or not period:
            continue
        if lowest is None or quota / period < lowest.cores:
            stat = _keyed(folder / "cpu.stat")
            lowest = CpuBudget(None if used_ns is None else used_ns / 1e9, quota / period, stat.get("nr_periods"), stat.get("nr_throttled"), folder)
    return lowest


def is_within(group: Path, root: Path = ROOT, membership: Path = MEMBERSHIP) -> bool:
    """Whether the process of `membership` counts in `group`, the folder of a CpuBudget."""
    if _is_version_2(root):
        return group in _folders(root, membership, "")
    return group in _folders(root / "cpu", membership, "cpu")


def frozen_by(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Path | None:
    """The file that says that the process's group is frozen, as by `docker pause`; None if it is not."""
    if _is_version_2(root):
        events = _folders(root, membership, "")[0] / "cgroup.events"
        return events if _keyed(events).get("frozen") else None
    # A group says so too if one above it is frozen.
    state = _folders(root / "freezer", membership, "freezer")[0] / "freezer.state"
    try:
        return state if state.read_text(encoding="ascii").strip() in ("FROZEN", "FREEZING") else None
    except (OSError, ValueError):
        return None


def _is_version_2(root: Path) -> bool:
    return (root / "cgroup.controllers").exists()


def _folders(mount: Path, membership: Path, controller: str) -> list[Path]:
    """The process's group and its ancestors, up to the mount.

    In a container the path may be relative to the host's hierarchy; then the mount itself is the group.
    """
    own = _own_path(membership, controller)
    folder = mount / own.lstrip("/")
    if not folder.is_dir():
        return [mount]
    chain = [folder, *folder.parents]
    return chain[: chain.index(mount) + 1]


def _own_path(membership: Path, controller: str) -> str:
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "/"
    for line in lines:
        _, names, path = line.split(":", 2)
        if (controller in names.split(",")) if controller else names == "":
            return path if ".." not in path else "/"
    return "/"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # ValueError: "max" of version 2
        return None


def _keyed(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):
        return {}


def _quota_2(path: Path) -> float | None:
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max 100000"
        return None


def oom_kills(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """The number of OOM kills in the process's group; None if the kernel does not report it."""
    if _is_version_2(root):
        return _keyed(_folders(root, membership, "")[0] / "memory.events").get("oom_kill")
    return _keyed(_folders(root / "memory", membership, "memory")[0] / "memory.oom_control").get("oom_kill")
