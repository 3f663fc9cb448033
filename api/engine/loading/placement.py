"""The automatic choices: model, device, number format, threads, slots and KV cache, each with its reason.

Reasons are logged and shown at `GET /info`. Nothing is loaded here; the functions only read the machine's state, so any
thread may call them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

import cgroup
from api.engine.config import EngineConfig
from api.engine.loaded_model import LoadError
from api.engine.loading.card import FIRST_WITH_BF16

FLASH = {"huggingface": "zai-org/GLM-4.6V-Flash", "modelscope": "ZhipuAI/GLM-4.6V-Flash"}
SLOTS = 16  # without a card
PAGE_TOKENS = 16
CHUNK_TOKENS = 512  # most prompt tokens in one step, unless set or the card is a large one
CPU_SHARE = 0.15  # of the memory that is free after loading the weights, for the KV cache
CPU_ENCODER_CACHE_BYTES = 256 * 2**20
GIB = 2**30
# Up to this size float32 is used: its cost is not noticeable, and it is the most exact.
SMALL_WEIGHTS_BYTES = 2 * 2**30
TINY_WEIGHTS_BYTES = 2**28


@dataclass(frozen=True)
class Selection:
    """A chosen value as text, and the reason."""

    value: str
    reason: str


@dataclass(frozen=True)
class Amount:
    """A chosen number, and the reason."""

    number: int
    reason: str


def choose_slots(config: EngineConfig) -> Amount:
    """Requests that run at once on the CPU; the memory plan chooses for a card."""
    return Amount(config.slots, "set by GLM_SLOTS") if config.slots else Amount(SLOTS, "the default for cpu")


def choose_kv_cache(
    config: EngineConfig, token_bytes: int, context_tokens: int, slots: int, weights_bytes: int
) -> Amount:
    """Tokens of the KV cache in host memory, in whole pages. `weights_bytes` are still to be loaded."""
    if config.kv_cache_bytes:
        budget, reason = config.kv_cache_bytes, "set by GLM_KV_CACHE_BYTES"
        if budget > (free := free_memory_bytes()):
            raise LoadError(f"GLM_KV_CACHE_BYTES must be <= {free}, the free memory. Given: {budget}")
    else:
        free = max(free_memory_bytes() - weights_bytes, 0)
        budget, reason = int(free * CPU_SHARE), f"{CPU_SHARE:.0%} of the {free / GIB:.1f} GiB free"
    most = -(-(slots + 1) * context_tokens // PAGE_TOKENS) * PAGE_TOKENS
    tokens = budget // token_bytes // PAGE_TOKENS * PAGE_TOKENS
    if not config.kv_cache_bytes and tokens >= most:
        tokens, reason = most, f"enough for {slots + 1} full contexts"
    return Amount(tokens, f"{tokens * token_bytes / 2**20:.0f} MiB: {reason}")


def free_memory_bytes() -> int:
    """Memory that this process can still allocate: the machine's, or its control group's if that is less."""
    host = psutil.virtual_memory()
    group = cgroup.memory(host.total)
    if group is None:
        return host.available
    return max(min(host.available, group.limit_bytes - group.used_bytes), 0)


def choose_device(config: EngineConfig) -> Selection:
    if config.device != "auto":
        return Selection(config.device, "set by GLM_DEVICE")
    if torch.cuda.is_available():
        return Selection("cuda", f"a GPU was found: {torch.cuda.get_device_name()}")
    return Selection("cpu", "no CUDA GPU was found")


def choose_model(config: EngineConfig, device: str) -> Selection:
    """The model itself wherever there is a card; whether it fits is the memory plan's to say, and never a reason for the
    demo."""
    if config.model != "auto":
        return Selection(config.model, "set by GLM_MODEL or --model")
    if device != "cuda":
        return Selection(str(config.root / config.demo), "the bundled demo, because there is no CUDA GPU for GLM-4.6V-Flash")
    return Selection(FLASH[config.hub], "there is a CUDA GPU; GLM_MODEL=models/shapes would be the bundled demo")


def free_gpu_bytes(device: str) -> int | None:
    return torch.cuda.mem_get_info()[0] if device == "cuda" and torch.cuda.is_available() else None


def choose_dtype(config: EngineConfig, device: str, weights_bytes: int) -> Selection:
    if config.dtype != "auto":
        return Selection(config.dtype, "set by GLM_DTYPE")
    if weights_bytes <= SMALL_WEIGHTS_BYTES:
        return Selection("float32", "a small model: full precision costs nothing")
    # Torch also calls a card able that only emulates it.
    if device == "cuda" and torch.cuda.get_device_capability() < FIRST_WITH_BF16:
        return Selection("float16", "this GPU has no bfloat16")
    return Selection("bfloat16", "the number format of the weights; half the memory of float32")


def choose_threads(config: EngineConfig, weights_bytes: int) -> Selection:
    if config.threads:
        return Selection(str(config.threads), "set by GLM_THREADS")
    if weights_bytes <= TINY_WEIGHTS_BYTES:
        return Selection("1", "more threads do not speed up a model this small")
    cores = usable_cores()
    if cores <= 2:  # a second thread is worth more than a free core: HTTP runs while threads wait
        return Selection(str(cores), f"all {cores} cores: threads that wait soon sleep, so HTTP gets its share")
    return Selection(str(cores - 1), f"{cores} cores, one of them left to HTTP")


def usable_cores() -> int:
    """Cores that this process may use: its CPU affinity, or the quota of its control group if that is less."""
    cores = len(os.sched_getaffinity(0))
    budget = cgroup.cpu()
    return cores if budget is None else min(cores, max(int(budget.cores), 1))
