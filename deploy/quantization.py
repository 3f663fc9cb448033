"""Says whether this machine will want 4-bit weights, for which start.sh installs requirements-quantized.txt.

    python -m deploy.quantization      exit code 0 if so

A GPU that does not answer within LIMIT_S counts as none: the answer must not keep the service from starting.
"""

from __future__ import annotations

import signal
import sys

from settings import load

BF16_MIB = 24 * 1024  # free memory from which the weights of GLM-4.6V-Flash need not be quantised
LIMIT_S = 20


def wanted(weights: str, device: str, free_mib: list[float]) -> bool:
    """`free_mib` of each GPU."""
    if weights == "auto":
        return device != "cpu" and any(free < BF16_MIB for free in free_mib)
    return weights == "nf4"


def free_gpu_mib() -> list[float]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetMemoryInfo(handle).free / 2**20 for handle in handles]
    except Exception:  # no driver, no GPU, or one that reports nothing
        return []


if __name__ == "__main__":
    signal.alarm(LIMIT_S)
    settings = load()
    sys.exit(0 if wanted(settings.weights, settings.device, free_gpu_mib()) else 1)
