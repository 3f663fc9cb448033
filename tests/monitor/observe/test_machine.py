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
            first = machine.read(interval_s=0.5)
            readings.append(first["cpu_percent"])
            assert "over 0.5 s only: this is the first run" in first["cpu_source"]
    finally:
        busy.kill()
        busy.join()

    assert readings[-1] > 5


def test_the_reading_takes_the_interval_it_claims():
    started = time.monotonic()

    machine.read(interval_s=0.3)

    assert time.monotonic() - started >= 0.3


def test_the_processor_is_measured_since_the_last_run_as_the_kernel_counts_it():
    """The load of the last moments, in which the checker itself works, is not the load of the minute."""
    before, began = machine.read_counters(), machine._processor_times()
    busy = multiprocessing.get_context("spawn").Process(target=burn, args=(time.monotonic() + 1.5,), daemon=True)
    busy.start()
    time.sleep(2.0)
    worked_s = time.process_time()
    while time.process_time() < worked_s + 0.5:  # the checker's own work
        pass

    reading = machine.read(interval_s=0.1, before=before)

    ended, own = machine._processor_times(), machine.own_s() - before["own_s"]
    if before["group"]:
        pytest.skip("the control group has a quota, so the machine's own counters measure something else")
    expected = 100 * (ended[0] - began[0] - own) / (ended[1] - began[1])
    assert own > 0.4
    assert reading["cpu_percent"] == pytest.approx(expected, abs=5)
    assert 2.0 < reading["cpu_interval_s"] < 30 and "only" not in reading["cpu_source"]
    busy.join()


def counters(**changes) -> dict:
    return {
        "boot_id": "b", "at": 1000.0, "busy_s": 500.0, "total_s": 2000.0, "steal_s": 5.0, "own_s": 3.0, "own_pid": 7, "group": "",
        **changes,
    }  # fmt: skip


LATER = {"at": 1060.0, "busy_s": 560.0, "total_s": 2120.0, "steal_s": 17.0}
GROUP = {"group": "/g", "used_s": 10.0, "cores": 0.5, "periods": 100, "throttled_periods": 10, "own_counts": True}


@pytest.mark.parametrize(
    ("before", "now", "percent"),
    [
        ({}, {**LATER, "own_s": 9.0}, 45.0),  # 60 s busy of 120, of which 6 were its own
        ({"own_end_s": 4.5}, {**LATER, "own_s": 3.0, "own_pid": 8}, 46.2),  # 1.5 s by the last process, 3 by this one
        (GROUP, {**LATER, **GROUP, "used_s": 25.0, "own_s": 6.0}, 40.0),  # 12 s of 30
        (GROUP, {**LATER, **GROUP, "used_s": 25.0, "own_s": 6.0, "own_counts": False}, 50.0),
    ],
)
def test_the_checkers_own_work_is_not_load(before, now, percent):
    reading = machine.cpu_use(counters(**before), counters(**now), counters(at=1059.5))

    assert reading["cpu_percent"] == percent
    assert reading["steal_percent"] == 10.0
    assert reading["cpu_interval_s"] == 60.0


@pytest.mark.parametrize(
    ("before", "why"),
    [(None, "first run"), ({"boot_id": "a"}, "was started"), ({"group": "/g"}, "control group has changed"), ({"busy_s": 9000.0}, "cannot be compared")],
)
def test_a_short_time_is_measured_and_said_where_the_last_run_does_not_compare(before, why):
    now = counters(**LATER)

    reading = machine.cpu_use(before and counters(**before), now, counters(at=1059.5, busy_s=559.9, total_s=2119.0))

    assert reading["cpu_percent"] == 10.0
    assert "over 0.5 s only" in reading["cpu_source"] and why in reading["cpu_source"]


def test_the_share_of_throttled_periods_is_of_the_time_since_the_last_run():
    now = counters(**{**LATER, **GROUP, "periods": 200, "throttled_periods": 108, "used_s": 40.0})

    reading = machine.cpu_use(counters(**GROUP), now, counters(**GROUP))

    assert (reading["throttled_percent"], reading["quota_cores"]) == (98.0, 0.5)


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
            {
                "cgroup.controllers": "cpu",
                "a/cpu.max": "150000 100000",
                "a/cpu.stat": "usage_usec 2500000\nnr_periods 9\nnr_throttled 4",
            },
            "0::/a",
            1.5,
            2.5,
        ),
        (
            {
                "cpu/a/cpu.cfs_quota_us": "400000",
                "cpu/a/cpu.cfs_period_us": "100000",
                "cpuacct/a/cpuacct.usage": "7000000000",
                "cpu/a/cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_time 1",
            },
            "3:cpu,cpuacct:/a",
            4.0,
            7.0,
        ),
    ],
)
def test_processor_quota_of_both_versions(tree, files, membership, cores, used_s):
    found = cgroup.cpu(**tree(files, membership))

    assert found == cgroup.CpuBudget(used_s, cores, periods=9, throttled_periods=4)
    assert found.folder is not None and found.folder.name == "a"


@pytest.mark.parametrize(
    ("files", "membership"),
    [
        (
            {
                "cgroup.controllers": "cpu memory",
                **{f"{at}cpu.stat": "usage_usec 1" for at in ("box/", "box/app/", "box/app/job/")},
                "box/cpu.max": "200000 100000", "box/app/cpu.max": "400000 100000", "box/app/job/cpu.max": "max 100000",
                "box/memory.max": str(2 * GIB), "box/memory.current": "9", "box/app/memory.max": str(GIB),
                "box/app/memory.current": "9", "box/app/job/memory.max": str(4 * GIB), "box/app/job/memory.current": "9",
            },
            "0::/box/app/job",
        ),
        (
            {
                "cpu/box/cpu.cfs_quota_us": "200000", "cpu/box/cpu.cfs_period_us": "100000", "cpu/box/app/job/cpu.cfs_quota_us": "-1",
                "cpu/box/app/cpu.cfs_quota_us": "400000", "cpu/box/app/cpu.cfs_period_us": "100000",
                "cpu/box/app/job/cpu.cfs_period_us": "100000",
                "memory/box/memory.limit_in_bytes": str(2 * GIB), "memory/box/memory.usage_in_bytes": "9",
                "memory/box/app/memory.limit_in_bytes": str(GIB), "memory/box/app/memory.usage_in_bytes": "9",
                "memory/box/app/job/memory.limit_in_bytes": str(4 * GIB), "memory/box/app/job/memory.usage_in_bytes": "9",
            },
            "3:cpu:/box/app/job\n4:memory:/box/app/job",
        ),
    ],
)  # fmt: skip
def test_the_lowest_limit_on_the_way_to_the_root_applies(tree, files, membership):
    made = tree(files, membership)

    budget, memory = cgroup.cpu(**made), cgroup.memory(64 * GIB, **made)

    assert budget is not None and budget.cores == 2.0
    assert memory is not None and memory.limit_bytes == GIB


def test_a_quota_without_the_usage_of_its_group():
    """Where cpu and cpuacct are hierarchies of their own, the machine's load is shown beside the throttling of the group."""
    group = {**GROUP, "used_s": None}

    reading = machine.cpu_use(counters(**group), counters(**{**LATER, **group, "periods": 200, "throttled_periods": 110}), counters())

    assert (reading["throttled_percent"], reading["quota_cores"], reading["cpu_percent"]) == (100.0, 0.5, 50.0)
    assert reading["cpu_source"].startswith("host")


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


@pytest.mark.parametrize(
    ("files", "membership", "frozen_by"),
    [
        ({"freezer/freezer.state": "THAWED", "freezer/x/freezer.state": "FROZEN"}, "6:freezer:/x", "freezer/x/freezer.state"),
        ({"freezer/freezer.state": "THAWED", "freezer/x/freezer.state": "THAWED"}, "6:freezer:/x", None),
        ({"cgroup.controllers": "", "x/cgroup.events": "populated 1\nfrozen 1"}, "0::/x", "x/cgroup.events"),
        ({"cgroup.controllers": "", "x/cgroup.events": "populated 1\nfrozen 0"}, "0::/x", None),
        ({"freezer/tasks": ""}, "6:freezer:/x", None),
    ],
)  # fmt: skip
def test_a_frozen_group_is_named(tree, files, membership, frozen_by):
    made = tree(files, membership)

    found = cgroup.frozen_by(**made)

    assert found == (made["root"] / frozen_by if frozen_by else None)
