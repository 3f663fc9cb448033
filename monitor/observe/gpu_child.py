"""Reads the GPU driver in a process of its own, because a driver call may never return.

    python gpu_child.py nvml|gputil      prints {"gpus": [...], "reason": null|"text"}

Run by monitor/observe/gpu.py, which kills it at its deadline. A value that the driver does not report is null.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable

MIB = 2**20
MEMORY_LIMIT_BYTES = 256 * MIB
# NVML's clock event reasons (nvml.h, nvmlClocksEventReason*).
THROTTLE = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
THROTTLE_HARDWARE = (0x8, 0x20, 0x40, 0x80)
# XIDs for which NVIDIA's catalogue recommends a GPU reset, a reboot or diagnostics. Application errors (13, 31, 43, 94, 109)
# are not listed.
XID_FATAL = frozenset({46, 48, 62, 64, 74, 79, 95, 119, 120, 140, 143})
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
XID_AGE_S = 900.0


def read_nvml() -> dict:
    try:
        import pynvml
    except ImportError as error:
        return {"gpus": [], "reason": f"nvidia-ml-py cannot be imported: {error}"}
    try:
        pynvml.nvmlInit()
        gpus = [_nvml_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return {"gpus": [], "reason": f"NVML: {error}"}
    errors = recent_xids(read_kernel_log())
    for gpu in gpus:
        gpu["faults"] += [f"XID {number} {age_s:.0f} s ago" for bus, number, age_s in errors if bus in (gpu["bus"] or "").lower()]
    return {"gpus": gpus, "reason": None if gpus else "NVML lists no GPU"}


def _nvml_gpu(pynvml: types.ModuleType, index: int) -> dict:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def query(function: Callable[[], float | str | bytes | list[int]]) -> float | str | list[int] | None:
        try:
            value = function()
        except (pynvml.NVMLError, AttributeError):  # this card (MIG, vGPU) or this driver does not report it
            return None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    return {
        "index": index,
        "name": query(lambda: pynvml.nvmlDeviceGetName(handle)),
        "load_percent": query(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "memory_used_mib": query(lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).used / MIB, 1)),
        "memory_total_mib": query(lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / MIB, 1)),
        "temperature_c": query(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        "power_w": query(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        "power_limit_w": query(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
        "uuid": query(lambda: pynvml.nvmlDeviceGetUUID(handle)),
        "bus": query(lambda: pynvml.nvmlDeviceGetPciInfo(handle).busId),
        **_throttle(query(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))),
        "ecc_uncorrected": query(
            lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            )
        ),
        "pcie_width": query(lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "pcie_width_max": query(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        "clock_mhz": query(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "clock_max_mhz": query(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "processes": query(lambda: [entry.pid for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]),
        "faults": ["rows could not be remapped"] if query(lambda: pynvml.nvmlDeviceGetRemappedRows(handle)[3]) else [],
    }


def _throttle(mask: object) -> dict:
    """Heat and power brake slowdowns are faults; a power cap and idle clocks are normal."""
    if not isinstance(mask, int):
        return {"throttle_reasons": None, "throttle_hardware": None}
    reasons = [name for bit, name in THROTTLE.items() if mask & bit]
    return {"throttle_reasons": reasons, "throttle_hardware": any(mask & bit for bit in THROTTLE_HARDWARE)}


def read_kernel_log() -> list[str]:
    """Lines of /dev/kmsg; empty where it is not readable, as in most containers."""
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    lines: list[str] = []
    try:
        while True:
            lines.append(os.read(descriptor, 8192).decode("utf-8", "replace"))
    except OSError:  # EAGAIN at the end
        return lines
    finally:
        os.close(descriptor)


def recent_xids(lines: list[str]) -> list[tuple[str, int, float]]:
    """(PCI bus id, XID, age in seconds) of recent fatal driver errors."""
    found = []
    now_s = time.clock_gettime(time.CLOCK_MONOTONIC)
    for line in lines:
        match = XID.search(line)
        stamp = line.split(",")[2:3]
        if match and stamp and stamp[0].isdigit():
            age_s = now_s - int(stamp[0]) / 1e6
            if int(match[2]) in XID_FATAL and 0 <= age_s <= XID_AGE_S:
                found.append((match[1].lower(), int(match[2]), age_s))
    return found


def read_gputil() -> dict:
    _supply_distutils()
    try:
        import GPUtil

        found = GPUtil.getGPUs()
    except (ImportError, ValueError, IndexError, OSError) as error:  # ValueError: nvidia-smi printed an error message
        return {"gpus": [], "reason": f"GPUtil: {type(error).__name__}: {error}"}
    gpus = [
        {
            "index": gpu.id,
            "name": gpu.name,
            "load_percent": _finite(gpu.load * 100),
            "memory_used_mib": _finite(gpu.memoryUsed),
            "memory_total_mib": _finite(gpu.memoryTotal),
            "temperature_c": _finite(gpu.temperature),
            "power_w": None,
        }
        for gpu in found
    ]
    return {"gpus": gpus, "reason": None if gpus else "nvidia-smi lists no GPU"}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _supply_distutils() -> None:
    """GPUtil 1.4.0 imports distutils, which Python 3.12 removed, for this one function."""
    if sys.version_info < (3, 12):
        return
    package, spawn = types.ModuleType("distutils"), types.ModuleType("distutils.spawn")
    spawn.find_executable = shutil.which  # type: ignore[attr-defined]
    package.spawn = spawn  # type: ignore[attr-defined]
    sys.modules.setdefault("distutils", package)
    sys.modules.setdefault("distutils.spawn", spawn)


def _end_if_it_grows() -> None:
    """GPUtil reads all that nvidia-smi prints, and one that prints for ever would fill the machine's memory."""
    while True:
        with open("/proc/self/statm", encoding="ascii") as file:
            used_bytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if used_bytes > MEMORY_LIMIT_BYTES:
            print(json.dumps({"gpus": [], "reason": "nvidia-smi prints without end"}), flush=True)
            os._exit(0)
        time.sleep(0.02)


if __name__ == "__main__":
    threading.Thread(target=_end_if_it_grows, daemon=True).start()
    print(json.dumps({"nvml": read_nvml, "gputil": read_gputil}[sys.argv[1]](), allow_nan=False))
