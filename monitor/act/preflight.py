"""Checks before a restart whether it can help: on a broken machine a new process may not start."""

from __future__ import annotations

from typing import Any

from monitor.judge.evidence import Observation
from monitor.judge.verdict import Verdict

DISK_NEEDED_MIB = 256.0  # start.sh refuses with less
OVERLOAD_PER_CORE = 4.0
OVERLOAD_PRESSURE_PERCENT = 60.0
STARVED = 0.25  # average number of runnable threads without a processor


def why_futile(verdict: Verdict, observation: Observation, cards_expected: int, disk_needed_mib: float = DISK_NEEDED_MIB) -> str:
    """Empty if a restart may help; otherwise what an operator must repair first."""
    for reason in (
        _disk(observation.machine, disk_needed_mib),
        _port(observation),
        _hardware(observation),
        _gpu(verdict, observation, cards_expected),
        _overload(verdict, observation.machine),
    ):
        if reason:
            return reason
    return ""


def _disk(machine: dict[str, Any], needed_mib: float) -> str:
    for disk in (machine.get("disks") or [])[:1]:  # the log folder, the only one that start.sh needs
        free_mib = disk.get("free_mib")
        if free_mib is not None and free_mib < needed_mib:
            return f"the disk of {disk['path']} is full ({free_mib:.0f} MiB free, {needed_mib:.0f} needed)"
    return ""


def _port(observation: Observation) -> str:
    process = observation.api.process
    if process.state == "gone" and process.port_owner == "stranger":
        return f"the port is held by {process.holder}"
    return ""


def _hardware(observation: Observation) -> str:
    if observation.api.process.state == "stuck":
        return f"process {observation.api.process.pid} is in uninterruptible sleep; only a reboot ends it"
    return f"the GPU has failed: {'; '.join(observation.api.hardware)}" if observation.api.hardware else ""


def _gpu(verdict: Verdict, observation: Observation, cards_expected: int) -> str:
    """In containers NVML is often lost while CUDA still works; a new process could not open the GPU then."""
    if verdict.target != "api":
        return ""
    if observation.gpu.get("hung"):
        return f"the GPU driver does not answer ({observation.gpu.get('reason')}); a new process could not open the GPU"
    cards = len(observation.gpu.get("gpus") or ())
    if cards < cards_expected:
        return f"{cards} of {cards_expected} GPUs are visible ({observation.gpu.get('reason')}); a new process could not open them"
    hot = [card["index"] for card in observation.gpu.get("gpus") or () if card.get("throttle_hardware")]
    if hot and verdict.word in ("wedged", "broken"):
        return f"GPU {hot[0]} is throttled by heat or power; a restart adds load"
    return ""


def _overload(verdict: Verdict, machine: dict[str, Any]) -> str:
    """A process that lacks processor time would lack it after a restart too.

    Does not apply to a process that is gone or stopped, whose threads do not wait for a processor, or that an operator
    restarts.
    """
    if verdict.rule in ("process_gone", "engine_dead", "port_closed", "frozen", "asked"):
        return ""
    waits = (machine.get("process") or {}).get("waits_for_processor")
    if waits is not None and waits < STARVED:
        return ""
    load, pressure = machine.get("load_per_core") or 0.0, machine.get("cpu_pressure_percent")
    if load > OVERLOAD_PER_CORE and (pressure is None or pressure > OVERLOAD_PRESSURE_PERCENT):
        return f"the machine is overloaded (load {load:.1f} per core); a restart would add to it"
    return ""
