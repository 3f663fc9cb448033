"""Why the API may be slow, from the readings of the machine and the card. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitor.judge.evidence import Observation

THROTTLED_PERCENT = 10.0  # of the periods in which it wanted to run
STEAL_PERCENT = 10.0
WAITING = 0.25  # threads that could run and had no processor, on average
MEMORY_PRESSURE_PERCENT = 10.0
SWAPPED_MIB = 64.0
SLOW_CLOCK = 0.5  # of the card's highest clock, while it computes
WORKING_PERCENT = 50.0

Cause = tuple[str, str]  # in English and Chinese


def causes_of(observation: Observation, lanes_before: Mapping[str, int]) -> list[Cause]:
    """What was seen, the likeliest first. `lanes_before`: the PCIe width of each card in healthy runs, by uuid or index."""
    if observation.api.process.state == "unrecorded":
        return []  # an external engine, which may run on another machine
    causes = [*_processor(observation.machine), *_memory(observation.machine)]
    for card in observation.gpu.get("gpus") or ():
        causes += _card(card, lanes_before, observation.api.process.pid)
    return causes


def _processor(machine: Mapping[str, Any]) -> list[Cause]:
    causes = []
    throttled, quota = machine.get("throttled_percent") or 0.0, machine.get("quota_cores")
    steal = machine.get("steal_percent") or 0.0
    waiting = (machine.get("process") or {}).get("waits_for_processor") or 0.0
    if throttled >= THROTTLED_PERCENT and quota is not None:
        causes.append((
            f"the processor quota of {quota:.3g} cores stopped it in {throttled:.0f} % of the periods",
            f"处理器配额为 {quota:.3g} 核，{throttled:.0f}% 的周期内被限制运行",
        ))  # fmt: skip
    elif waiting >= WAITING:
        used, load = machine.get("cpu_percent"), machine.get("load_per_core")
        shown = "?" if used is None else f"{used:.0f}"
        causes.append((
            f"other work has the processor: {waiting:.1f} of its threads wait for it ({shown} % in use, load {load} per core)",
            f"处理器被其他任务占用：平均 {waiting:.1f} 个线程在等待（使用率 {shown}%，每核负载 {load}）",
        ))  # fmt: skip
    if steal >= STEAL_PERCENT:
        causes.append((f"the host gives {steal:.0f} % of the processor to others (steal)", f"宿主机把 {steal:.0f}% 的处理器时间分给了其他虚拟机"))
    return causes


def _memory(machine: Mapping[str, Any]) -> list[Cause]:
    causes = []
    pressure, swapped = machine.get("memory_pressure_percent") or 0.0, (machine.get("process") or {}).get("swapped_mib") or 0.0
    if pressure >= MEMORY_PRESSURE_PERCENT:
        causes.append((f"memory is short: tasks waited for it {pressure:.0f} % of the last minute", f"内存紧张：最近一分钟有 {pressure:.0f}% 的时间在等待内存"))
    if swapped >= SWAPPED_MIB:
        causes.append((f"{swapped:.0f} MiB of it are swapped out", f"有 {swapped:.0f} MiB 被换出到磁盘"))
    return causes


def _card(card: Mapping[str, Any], lanes_before: Mapping[str, int], api_pid: int | None) -> list[Cause]:
    causes = []
    name, reasons = f"GPU {card.get('index')}", card.get("throttle_reasons") or []
    clock, top, load = card.get("clock_mhz"), card.get("clock_max_mhz"), card.get("load_percent") or 0.0
    slow_clock = load >= WORKING_PERCENT and clock is not None and top is not None and clock < SLOW_CLOCK * top
    if card.get("throttle_hardware") or slow_clock:
        why = ", ".join(reasons) or "no reason reported"
        shown = f"{clock:.0f} of {top:.0f} MHz" if clock and top else "?"
        causes.append((f"{name} runs at {shown} ({why})", f"{name} 降频运行：{shown}（{why}）"))
    lanes, before = card.get("pcie_width"), lanes_before.get(str(card.get("uuid") or card.get("index")))
    if lanes and before and lanes < before:
        causes.append((f"{name} has {lanes} PCIe lanes and had {before}", f"{name} 的 PCIe 通道从 {before} 条降为 {lanes} 条"))
    others = [pid for pid in card.get("processes") or () if pid != api_pid]
    # In a container the driver may list pids of the host, among which this process is not found.
    if others and api_pid in (card.get("processes") or ()):
        causes.append((f"{name} is shared with process {', '.join(map(str, others[:3]))}", f"{name} 上还有其他进程：{', '.join(map(str, others[:3]))}"))
    return causes
