"""The process that touches the GPU driver, so that the checker does not: a driver call may never return.

    python gpu_child.py nvml|gputil      prints {"gpus": [...], "reason": null|"text"}

Run by monitor/gpu.py, which kills it when it takes too long. A value that the driver does not tell is null.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from collections.abc import Callable

MIB = 2**20


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
    return {"gpus": gpus, "reason": None if gpus else "NVML lists no GPU"}


def _nvml_gpu(pynvml: types.ModuleType, index: int) -> dict:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: Callable[[], float | str | bytes]) -> float | str | None:
        try:
            value = function()
        except pynvml.NVMLError:  # this card does not tell it (MIG, vGPU)
            return None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    return {
        "index": index,
        "name": ask(lambda: pynvml.nvmlDeviceGetName(handle)),
        "load_percent": ask(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "memory_used_mib": ask(lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).used / MIB, 1)),
        "memory_total_mib": ask(lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / MIB, 1)),
        "temperature_c": ask(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        "power_w": ask(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
    }


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
    """GPUtil 1.4.0 imports distutils, which Python 3.12 removed; it needs this one function of it."""
    if sys.version_info < (3, 12):
        return
    package, spawn = types.ModuleType("distutils"), types.ModuleType("distutils.spawn")
    spawn.find_executable = shutil.which  # type: ignore[attr-defined]
    package.spawn = spawn  # type: ignore[attr-defined]
    sys.modules.setdefault("distutils", package)
    sys.modules.setdefault("distutils.spawn", spawn)


if __name__ == "__main__":
    print(json.dumps({"nvml": read_nvml, "gputil": read_gputil}[sys.argv[1]](), allow_nan=False))
