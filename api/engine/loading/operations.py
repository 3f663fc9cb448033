"""The choice of a model's operations, compiled, Triton or torch: made once, before the engine is ready.

Those of the CPU are built and tried while the weights are loaded, and used where they are quicker; those of a CUDA device are compared with plain torch,
path by path, on that device. If that takes too long or a trial fails, torch computes until the next start; operations
never change under a running engine.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from api.engine.config import EngineConfig
from api.engine.cuda.shape import shape_of
from api.engine.cuda.support import unsupported as unsupported_on_cuda
from api.engine.kernels.build import KernelError, PendingLibrary, unsupported
from api.engine.kernels.choice import Choice
from api.engine.kernels.choice import shape_of as kernel_shape_of
from api.engine.kernels.operations import CompiledOperations
from api.engine.kernels.speed import choose as choose_quicker
from api.engine.loading.placement import PAGE_TOKENS, Selection, free_memory_bytes
from api.engine.model.operations import Operations, TorchOperations
from api.engine.model.recipe import BF16, Recipe
from api.engine.model.rotary import head_dim_of

logger = logging.getLogger(__name__)

WAIT_S = 60.0  # for the compiler and the trial, once the weights are loaded


class OperationsChoice:
    """Created before the weights are loaded, to compile in the meantime; `choose` is called after. Engine thread only."""

    def __init__(
        self, config: EngineConfig, device: str, dtype: torch.dtype, model_config: Any, recipe: Recipe = BF16
    ) -> None:
        self._pending: PendingLibrary | None = None
        self._reason = "set by GLM_KERNELS"
        self._recipe, self._device, self._dtype, self._config = recipe, device, dtype, model_config
        # For `GET /info`: what each path of a CUDA device was found to be, and what is quicker on a CPU.
        self.proofs: dict[str, str] = {}
        self._steady = config.kernels == "steady"
        self._triton = False
        if config.kernels == "torch":
            return
        if device == "cuda":
            reason = unsupported_on_cuda(device, dtype, _head_dims(model_config))
            self._triton, self._reason = reason is None, reason or ""
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
        if self._triton:
            return self._proven_on_cuda()
        if self._pending is None:
            return TorchOperations(PAGE_TOKENS, self._recipe), Selection("torch", self._reason)
        try:
            library = self._pending.wait(WAIT_S)
            torch.ops.load_library(str(library))
        except (KernelError, OSError, RuntimeError) as error:
            return without_compiled(error)
        choice = self._quicker(library)
        return CompiledOperations(choice), Selection("compiled", "each operation as it is quicker on this machine: see proofs")

    def _quicker(self, library: Path) -> Choice:
        """Compiled or torch for each operation, by their times on this very machine."""
        began = time.monotonic()
        choice = choose_quicker(kernel_shape_of(self._config), library, free_memory_bytes(), self._steady)
        logger.info("event=trial seconds=%.2f", time.monotonic() - began)
        for name, found in choice.findings.items():
            self.proofs[name] = found
            logger.info("event=proof path=%s found=%s", json.dumps(name), json.dumps(found))
        return choice

    def _proven_on_cuda(self) -> tuple[Operations, Selection]:
        """The kernels that are right on this very device. Imports Triton."""
        try:
            from api.engine.cuda.operations import CudaOperations
            from api.engine.cuda.self_test import prove
        except ImportError as error:
            return without_compiled(error)
        device = torch.device(self._device)
        operations = CudaOperations(PAGE_TOKENS, torch.cuda.get_device_capability(device), self._recipe)
        proofs = prove(operations, shape_of(self._config, PAGE_TOKENS), device, self._dtype)
        for proof in proofs:
            self.proofs[proof.path] = f"{'used' if proof.proven else 'off'}: {proof.reason}"
            level = logging.INFO if proof.proven else logging.WARNING
            logger.log(level, "event=proof path=%s used=%s reason=%s", proof.path, proof.proven, json.dumps(proof.reason))
        off = {proof.path: proof.reason for proof in proofs if not proof.proven}
        operations.use_plain(off)
        reason = "each path was compared with plain torch on this device"
        why = "; ".join(f"{path}: {found}" for path, found in off.items())
        return operations, Selection("triton", f"{reason}; off: {why}" if off else reason)


def without_compiled(error: Exception) -> tuple[Operations, Selection]:
    return TorchOperations(PAGE_TOKENS), Selection("torch", f"the compiled kernels cannot be used: {error}")


def _head_dims(model_config: Any) -> tuple[int, int]:
    text, vision = model_config.get_text_config(), model_config.vision_config
    return head_dim_of(text), vision.hidden_size // vision.num_heads
