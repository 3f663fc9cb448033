"""The choice of a model's operations, compiled or torch: made once, before the engine is ready.

The compiled ones are built and tried while the weights are loaded. If that takes too long or the trial fails, torch
computes until the next start; operations never change under a running engine.
"""

from __future__ import annotations

from typing import Any

import torch

from api.engine.config import EngineConfig
from api.engine.kernels.build import KernelError, PendingLibrary, unsupported
from api.engine.kernels.operations import CompiledOperations
from api.engine.loading.placement import PAGE_TOKENS, Selection
from api.engine.model.operations import Operations, TorchOperations
from api.engine.model.recipe import BF16, Recipe
from api.engine.model.rotary import head_dim_of

WAIT_S = 60.0  # for the compiler and the trial, once the weights are loaded


class OperationsChoice:
    """Created before the weights are loaded, to compile in the meantime; `choose` is called after. Engine thread only."""

    def __init__(
        self, config: EngineConfig, device: str, dtype: torch.dtype, model_config: Any, recipe: Recipe = BF16
    ) -> None:
        self._pending: PendingLibrary | None = None
        self._reason = "set by GLM_KERNELS"
        self._recipe = recipe
        if config.kernels == "torch":
            return
        if recipe != BF16:
            self._reason = f"the compiled kernels do not multiply {recipe.name} weights"
            return
        if (reason := unsupported(device, dtype, PAGE_TOKENS, _head_dims(model_config))) is not None:
            self._reason = reason
        else:
            self._pending = PendingLibrary()

    def choose(self) -> tuple[Operations, Selection]:
        """Waits up to WAIT_S for a library that is still being compiled."""
        if self._pending is None:
            return TorchOperations(PAGE_TOKENS, self._recipe), Selection("torch", self._reason)
        try:
            library = self._pending.wait(WAIT_S)
            torch.ops.load_library(str(library))
        except (KernelError, OSError, RuntimeError) as error:
            return without_compiled(error)
        return CompiledOperations(), Selection("compiled", str(library))


def without_compiled(error: Exception) -> tuple[Operations, Selection]:
    return TorchOperations(PAGE_TOKENS), Selection("torch", f"the compiled kernels cannot be used: {error}")


def _head_dims(model_config: Any) -> tuple[int, int]:
    text, vision = model_config.get_text_config(), model_config.vision_config
    return head_dim_of(text), vision.hidden_size // vision.num_heads
