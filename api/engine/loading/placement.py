"""Which model, on which device, in which number format, with how many threads, and why.

Every automatic choice comes with the reason that is logged and shown at `/info`. Loads nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from settings import ROOT, Settings

FLASH = {"huggingface": "zai-org/GLM-4.6V-Flash", "modelscope": "ZhipuAI/GLM-4.6V-Flash"}
# bf16 weights are 20.6 GB; the rest is for the vision encoder's activations and the KV cache.
FLASH_NEEDS_BYTES = 24 * 2**30
DEMO = ROOT / "models" / "shapes"
SLOTS = {"cpu": 16, "cuda": 32}
PAGE_TOKENS = 16
# The KV cache takes this part of the memory that is free once the weights are loaded.
CPU_SHARE, GPU_SHARE = 0.15, 0.9
GPU_WORK_BYTES = 2 * 2**30
GIB = 2**30
# Below this, float32 costs nothing that anybody would notice and is the most exact.
SMALL_WEIGHTS_BYTES = 2 * 2**30
TINY_WEIGHTS_BYTES = 2**28


@dataclass(frozen=True)
class Selection:
    value: str
    reason: str


@dataclass(frozen=True)
class Amount:
    number: int
    reason: str


def choose_slots(settings: Settings, device: str) -> Amount:
    """How many requests run at once."""
    if settings.slots:
        return Amount(settings.slots, "set by GLM_SLOTS")
    number = SLOTS[device]
    return Amount(number, f"the choice for {device}")


def choose_kv_cache(settings: Settings, device: str, token_bytes: int, context_tokens: int, slots: int) -> Amount:
    """Tokens whose keys and values are kept, in whole pages."""
    if settings.kv_cache_bytes:
        budget, reason = settings.kv_cache_bytes, "set by GLM_KV_CACHE_BYTES"
    elif device == "cuda":
        free = free_gpu_bytes(device) or 0
        budget = max(int(free * GPU_SHARE) - GPU_WORK_BYTES, 0)
        reason = f"{GPU_SHARE:.0%} of the {free / GIB:.1f} GiB free beside the weights, less room to work"
    else:
        free = free_memory_bytes()
        budget, reason = int(free * CPU_SHARE), f"{CPU_SHARE:.0%} of the {free / GIB:.1f} GiB free"
    most = -(-(slots + 1) * context_tokens // PAGE_TOKENS) * PAGE_TOKENS
    tokens = budget // token_bytes // PAGE_TOKENS * PAGE_TOKENS
    if not settings.kv_cache_bytes and tokens >= most:
        tokens, reason = most, f"enough for {slots + 1} full contexts"
    return Amount(tokens, f"{tokens * token_bytes / 2**20:.0f} MiB: {reason}")


def free_memory_bytes() -> int:
    """Memory this process may still take: the machine's, and its container's if that is less."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return max(free, 0)


def choose_device(settings: Settings) -> Selection:
    if settings.device != "auto":
        return Selection(settings.device, "set by GLM_DEVICE")
    if torch.cuda.is_available():
        return Selection("cuda", f"a GPU is there: {torch.cuda.get_device_name()}")
    return Selection("cpu", "no CUDA GPU was found")


def choose_model(settings: Settings, device: str, free_gpu_bytes: int | None) -> Selection:
    if settings.model != "auto":
        return Selection(settings.model, "set by GLM_MODEL or --model")
    if device != "cuda" or free_gpu_bytes is None:
        return Selection(str(DEMO), "the bundled demo, because there is no CUDA GPU to hold GLM-4.6V-Flash")
    free = f"{free_gpu_bytes / 2**30:.1f} GiB of GPU memory are free"
    if free_gpu_bytes < FLASH_NEEDS_BYTES:
        need = FLASH_NEEDS_BYTES // 2**30
        return Selection(str(DEMO), f"the bundled demo, because only {free} and GLM-4.6V-Flash needs {need} GiB")
    return Selection(FLASH[settings.hub], f"{free}, enough for GLM-4.6V-Flash")


def free_gpu_bytes(device: str) -> int | None:
    return torch.cuda.mem_get_info()[0] if device == "cuda" and torch.cuda.is_available() else None


def choose_dtype(settings: Settings, device: str, weights_bytes: int) -> Selection:
    if settings.dtype != "auto":
        return Selection(settings.dtype, "set by GLM_DTYPE")
    if weights_bytes <= SMALL_WEIGHTS_BYTES:
        return Selection("float32", "a small model: full precision costs nothing")
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        return Selection("float16", "this GPU has no bfloat16")
    return Selection("bfloat16", "the number format of the weights; half the memory of float32")


def choose_threads(settings: Settings, weights_bytes: int) -> Selection:
    if settings.threads:
        return Selection(str(settings.threads), "set by GLM_THREADS")
    if weights_bytes <= TINY_WEIGHTS_BYTES:
        return Selection("1", "so small a model gains nothing from more")
    cores = usable_cores()
    if cores <= 2:  # a second thread is worth more than a free core: HTTP gets its turn while threads wait
        return Selection(str(cores), f"all of {cores}: threads that wait sleep soon, so HTTP gets its turn")
    return Selection(str(cores - 1), f"{cores} cores, one of them left to HTTP")


def usable_cores() -> int:
    """Cores this process may use: its CPU affinity, and the quota of its container if there is one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(int(quota) // int(period), 1))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: affinity is all there is to know
    return cores
