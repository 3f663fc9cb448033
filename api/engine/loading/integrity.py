"""The integrity of a loaded checkpoint: its fingerprint, the sums of its weights, and loading them again.

Implements api.engine.guard.Integrity. Engine thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch

from api.engine.guard import Comparison
from api.engine.loaded_model import LoadError
from api.engine.loading.placement import GIB, free_memory_bytes
from api.engine.loading.weights import Weights
from api.engine.model.fingerprint import fingerprint
from api.engine.model.runner import Glm4vRunner
from api.engine.model.weights import part_sums, raw_bytes, weights_of
from api.engine.process import release_freed_memory

logger = logging.getLogger(__name__)


BESIDE_BYTES = 2 * GIB  # what loading takes besides the weights as they are kept: the largest matrix, and buffers


class CheckpointIntegrity:
    """`weights` are those that the runner was made of, to be loaded again."""

    def __init__(
        self,
        runner: Glm4vRunner,
        image_token_id: int,
        weights: Weights,
        every_s: float,
        reference: Comparison,
    ) -> None:
        self.every_s, self.reference = every_s, reference
        self._runner, self._image_token_id = runner, image_token_id
        self._weights = weights

    def fingerprint(self, interrupted: Callable[[], bool]) -> dict[str, str] | None:
        return fingerprint(self._runner, self._image_token_id, interrupted)

    def weight_sums(self) -> Iterator[tuple[str, int]]:
        return part_sums(self._runner)

    def drop_caches(self) -> None:
        self._runner.drop_tables()

    def reload(self) -> None:
        """Where memory allows, the old weights stay until the new ones are complete, so that a checkpoint that cannot be
        read changes nothing. Otherwise they are freed before, and the same failure ends the engine."""
        began = time.monotonic()
        size = sum(len(raw_bytes(tensor)) for _, tensor in weights_of(self._runner))
        both = _free_bytes(self._runner) > size + BESIDE_BYTES
        if not both:
            logger.warning("event=reload old_weights=freed_first size_gib=%.1f", size / GIB)
            self._runner.release_weights()
            release_freed_memory()
        try:
            self._weights.load(self._runner.operations, self._runner.take_weights)
        except Exception as error:
            if not both:
                raise
            raise LoadError(f"the weights cannot be loaded: {type(error).__name__}: {error}") from None
        logger.info("event=weights_reloaded seconds=%.2f", time.monotonic() - began)


def _free_bytes(runner: Glm4vRunner) -> int:
    if runner.decoder.device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return free_memory_bytes()
