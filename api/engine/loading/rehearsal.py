"""The largest steps, computed once after loading: the KV cache then takes what the card really has left.

The plan and the measurement are logged side by side. Engine thread only.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from api.engine.loaded_model import LoadError
from api.engine.loading.card import GIB, MIB
from api.engine.loading.memory_plan import KV_STEP, MOST_CONTEXTS, Measured, MemoryPlan, beside, kv_budget

logger = logging.getLogger(__name__)

LEAST_CONTEXT = 2048  # with less there is nothing to serve


class Memory(Protocol):
    """The memory of the device: api.engine.loading.card.CardMemory, which a test replaces."""

    def free_bytes(self) -> int: ...

    def allocated_bytes(self) -> int: ...

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int: ...


class Rehearsing(Protocol):
    """A runner whose weights are loaded."""

    def rehearse(self, image_tokens: int, chunk_tokens: int, rows: int) -> None:
        """Compute the steps that take most memory."""


def measure(runner: Rehearsing, plan: MemoryPlan, memory: Memory) -> Measured:
    """Raises LoadError if the largest picture does not fit."""
    weights = memory.allocated_bytes()
    memory.reset_peak()
    try:
        runner.rehearse(plan.picture_tokens, plan.chunk_tokens, plan.slots + 1)
    except torch.OutOfMemoryError:
        raise LoadError(
            f"The card has no room for a picture of {plan.picture_tokens} image tokens beside the weights. Set "
            f"GLM_MAX_PICTURE_TOKENS to less, or GLM_WEIGHTS to a smaller recipe than {plan.recipe.name}."
        ) from None
    workspace = memory.peak_bytes() - weights
    return Measured(weights, max(workspace, 0), memory.free_bytes())


def size_cache(runner: Rehearsing, plan: MemoryPlan, memory: Memory, asked_bytes: int = 0) -> tuple[int, str]:
    """Tokens of the KV cache and the reason. `asked_bytes`: set by the operator. Raises LoadError."""
    measured = measure(runner, plan, memory)
    budget = kv_budget(plan, measured)
    chosen = min(asked_bytes, budget) if asked_bytes else budget
    tokens = min(chosen // plan.kv_token_bytes // KV_STEP * KV_STEP, plan.most_kv_tokens)
    for name, (planned, found) in beside(plan, measured, tokens * plan.kv_token_bytes).items():
        logger.info("event=memory part=%s planned_mib=%d measured_mib=%d", name, planned // MIB, found // MIB)
    if tokens < LEAST_CONTEXT:
        raise LoadError(
            f"The card has room for {tokens} tokens of KV cache, and {LEAST_CONTEXT} are needed: "
            f"{measured.free_bytes / GIB:.1f} GiB are free after loading {plan.recipe.name} weights. "
            "End what else uses the card, set GLM_WEIGHTS=nf4, or lower GLM_MAX_PICTURE_TOKENS or GLM_SLOTS."
        )
    free = f"{measured.free_bytes / GIB:.1f} GiB free after loading"
    if tokens == plan.most_kv_tokens:
        return tokens, f"{tokens * plan.kv_token_bytes / MIB:.0f} MiB: {MOST_CONTEXTS} full contexts for each request"
    if asked_bytes and asked_bytes <= budget:
        return tokens, f"{chosen / MIB:.0f} MiB: set by GLM_KV_CACHE_BYTES"
    work = f"{measured.workspace_bytes / MIB:.0f} MiB measured for the largest picture and chunk"
    limited = "; GLM_KV_CACHE_BYTES asks for more than there is" if asked_bytes else ""
    return tokens, f"{chosen / MIB:.0f} MiB: what {free} leave beside {work}{limited}"
