"""Whether the kernels of this room can run on a device. Imports no Triton."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

OLDEST = (7, 5)  # Turing: the oldest that Triton compiles for
DTYPES = (torch.bfloat16, torch.float16)


def unsupported(device: str | torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]) -> str | None:
    """The reason why the Triton kernels cannot be used, or None. `head_dims` are those of the text and vision models.

    Triton compiles a small C file when it starts, for which it needs a compiler and Python's headers.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"they need a CUDA device, not {device.type}"
    if torch.version.cuda is None:
        return "they are written for NVIDIA's devices, and this torch is not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"they need compute capability {OLDEST[0]}.{OLDEST[1]}, this device has {capability[0]}.{capability[1]}"
    if dtype not in DTYPES or (dtype == torch.bfloat16 and capability < (8, 0)):
        return f"they do not compute in {str(dtype).removeprefix('torch.')} on this device"
    if odd := [size for size in head_dims if size < 16 or size & (size - 1)]:
        return f"they need heads of 16, 32, 64, 128 ... dimensions, not {odd[0]}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "Triton needs a C compiler: install gcc"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Triton needs Python's headers: install python3-dev or the like"
    return None
