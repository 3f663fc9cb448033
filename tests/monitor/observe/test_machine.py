"""Processor and memory, on this machine and in recorded control-group trees."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import cgroup
from monitor.act import preflight
from monitor.observe import machine

GIB = 2**30


@pytest.fixture
def tree(tmp_path: Path):
    """Writes files below a control-group mount and the line that says where the process is."""

    def make(files: dict[str, str], membership: str) -> dict[str, Path]:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        (tmp_path / "membership").write_text(membership + "\n")
        return {"root": tmp_path / "cgroup", "membership": tmp_path / "membership"}

    return make


def burn(until: float) -> None:
    while time.monotonic() < until:
        pass


def test_a_working_processor_is_seen_in_the_first_reading():
    busy = multiprocessing.get_context("spawn").Process(target=burn, args=(time.monotonic() + 60,), daemon=True)
    busy.start()
    readings = []
    try:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and not (readings and readings[-1] > 5):
            readings.append(machine.read_cpu(interval_s=0.5)["cpu_percent"])
    finally:
        busy.kill()
        busy.join()

    assert readings[-1] > 5


def test_the_reading_takes_the_interval_it_claims():
    started = time.monotonic()

    machine.read_cpu(interval_s=0.3)

    assert time.monotonic() - started >= 0.3


def test_memory_without_a_limit_is_the_hosts(tree):
    reading = machine.read_memory(**tree({"cgroup.controllers": "memory", "memory.max": "max"}, "0::/"))

    assert reading["memory_source"] == "host"
    assert reading["memory_limit_bytes"] == psutil.virtual_memory().total
    assert 0 < reading["memory_used_percent"] < 100


def test_memory_limit_of_version_2_counts_without_the_file_cache(tree):
    files = {
        "cgroup.controllers": "cpu memory",
        "box/memory.max": str(GIB),
        "box/memory.current": str(GIB * 3 // 4),
        "box/memory.stat": f"anon 1\ninactive_file {GIB // 4}\nactive_file 9",
        "box/app/memory.max": "max",
        "box/app/memory.current": "5",
    }

    reading = machine.read_memory(**tree(files, "0::/box/app"))

    assert reading["memory_used_percent"] == 50.0
    assert reading["memory_limit_bytes"] == GIB
    assert "box/memory.max" in reading["memory_source"]


def test_memory_limit_of_version_1(tree):
    files = {
        "memory/docker/memory.limit_in_bytes": str(2 * GIB),
        "memory/docker/memory.usage_in_bytes": str(GIB),
        "memory/docker/memory.stat": f"total_inactive_file {GIB // 2}",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": str(20 * GIB),
    }

    use = cgroup.memory(64 * GIB, **tree(files, "4:memory:/docker\n1:cpu:/"))

    assert use is not None
    assert (use.used_bytes, use.limit_bytes) == (GIB // 2, 2 * GIB)


def test_path_of_the_hosts_view_falls_back_to_the_mount(tree):
    files = {"cgroup.controllers": "", "memory.max": str(GIB), "memory.current": str(GIB // 2), "memory.stat": ""}

    use = cgroup.memory(64 * GIB, **tree(files, "0::/system.slice/docker-abc.scope"))

    assert use is not None and use.limit_bytes == GIB


@pytest.mark.parametrize(
    ("files", "membership", "cores", "used_s"),
    [
        (
            {"cgroup.controllers": "cpu", "a/cpu.max": "150000 100000", "a/cpu.stat": "usage_usec 2500000"},
            "0::/a",
            1.5,
            2.5,
        ),
        (
            {
                "cpu/a/cpu.cfs_quota_us": "400000",
                "cpu/a/cpu.cfs_period_us": "100000",
                "cpuacct/a/cpuacct.usage": "7000000000",
            },
            "3:cpu,cpuacct:/a",
            4.0,
            7.0,
        ),
    ],
)
def test_processor_quota_of_both_versions(tree, files, membership, cores, used_s):
    assert cgroup.cpu(**tree(files, membership)) == cgroup.CpuBudget(used_s, cores)


def test_no_processor_quota(tree):
    assert (
        cgroup.cpu(**tree({"cgroup.controllers": "cpu", "cpu.max": "max 100000", "cpu.stat": "usage_usec 1"}, "0::/"))
        is None
    )
    assert cgroup.cpu(**tree({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/")) is None


def test_a_process_that_lacks_the_processor_is_distinguished_from_one_that_sleeps():
    """Two processes that spin on one processor starve each other; one that sleeps waits for nothing."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    codes = (spin, spin, "import time\nprint(flush=True)\ntime.sleep(600)")
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for code in codes]
    try:
        for process in running:
            process.stdout.readline()
        shares = [machine.read(process.pid, 1.0)["process"]["waits_for_processor"] for process in running[1:]]
    finally:
        for process in running:
            process.kill()
            process.communicate()

    assert shares[0] > preflight.STARVED > shares[1]
