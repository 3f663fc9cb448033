"""What an error of a CUDA device means for the requests: too little memory, the device lost, or this work alone."""

from __future__ import annotations

from typing import Literal

import torch

# Of the runtime, cuBLAS, pinned memory and Triton: their errors have no class of their own.
MEMORY = ("out of memory", "ALLOC_FAILED")
# After one of these every later call fails, too.
LOST = ("CUDA error", "Triton Error [CUDA]", "CUDNN_STATUS", "CUBLAS_STATUS", "CUDA driver error")


def scope_of(error: BaseException) -> Literal["request", "memory", "device"]:
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(mark in text for mark in MEMORY):
        return "memory"
    if isinstance(error, torch.AcceleratorError) or any(mark in text for mark in LOST):
        return "device"
    return "request"
