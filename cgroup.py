"""Limits and use of the control group of a process, versions 1 and 2: what a container may really have.

The server sizes its caches and threads by it, the checker reports it. Nested groups count: the tightest limit on the way
up holds. Reads files only, so any thread may call; `root` and `membership` are arguments so that a recorded tree can stand
in. Where no limit is set the functions return None, and the host's own numbers are the true ones.
Source: the kernel's documentation, admin-guide/cgroup-v2 and admin-guide/cgroup-v1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryUse:
    """`used_bytes` leaves out file cache that the kernel would give back before it kills anything."""

    used_bytes: int
    limit_bytes: int
    source: str


@dataclass(frozen=True)
class CpuBudget:
    """Processor seconds used so far by the group, and how many cores it may use at most."""

    used_s: float
    cores: float


def memory(host_total_bytes: int, root: Path = ROOT, membership: Path = MEMBERSHIP) -> MemoryUse | None:
    """The tightest memory limit above the process, or None if nothing limits it below the host's memory."""
    if _is_version_2(root):
        folders = _folders(root, membership, "")
        limit_name, used_name, cache_key = "memory.max", "memory.current", "inactive_file"
    else:
        folders = _folders(root / "memory", membership, "memory")
        limit_name, used_name, cache_key = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    tightest: MemoryUse | None = None
    for folder in folders:
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        # Version 1 writes "no limit" as a number larger than any memory.
        if limit is None or used is None or limit >= host_total_bytes:
            continue
        if tightest is None or limit < tightest.limit_bytes:
            cache = _keyed(folder / "memory.stat").get(cache_key, 0)
            tightest = MemoryUse(max(0, used - cache), limit, str(folder / limit_name))
    return tightest


def cpu(root: Path = ROOT, membership: Path = MEMBERSHIP) -> CpuBudget | None:
    """The tightest processor quota above the process, or None if there is none."""
    tightest: CpuBudget | None = None
    if _is_version_2(root):
        for folder in _folders(root, membership, ""):
            cores = _quota_2(folder / "cpu.max")
            used_us = _keyed(folder / "cpu.stat").get("usage_usec")
            if cores is not None and used_us is not None and (tightest is None or cores < tightest.cores):
                tightest = CpuBudget(used_us / 1e6, cores)
        return tightest
    for folder in _folders(root / "cpu", membership, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        used_ns = _number(root / "cpuacct" / folder.relative_to(root / "cpu") / "cpuacct.usage")
        if quota is None or quota <= 0 or not period or used_ns is None:
            continue
        if tightest is None or quota / period < tightest.cores:
            tightest = CpuBudget(used_ns / 1e9, quota / period)
    return tightest


def _is_version_2(root: Path) -> bool:
    return (root / "cgroup.controllers").exists()


def _folders(mount: Path, membership: Path, controller: str) -> list[Path]:
    """The process's own group and everything above it, up to the mount.

    Inside a container the named path may belong to the host's view; then the mount itself is the group.
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
    except (OSError, ValueError):  # ValueError: version 2 writes "max"
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
    """How often the kernel has killed in this group for memory; a rise is the best answer to "why did it die"."""
    if _is_version_2(root):
        return _keyed(_folders(root, membership, "")[0] / "memory.events").get("oom_kill")
    return _keyed(_folders(root / "memory", membership, "memory")[0] / "memory.oom_control").get("oom_kill")
