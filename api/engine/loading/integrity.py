"""The integrity of a loaded checkpoint: its fingerprint, the sums of its weights, and loading them again.

Implements api.engine.guard.Integrity. Engine thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from api.engine.guard import Comparison
from api.engine.loaded_model import LoadError
from api.engine.loading.placement import GIB, free_memory_bytes
from api.engine.model.fingerprint import fingerprint
from api.engine.model.runner import Glm4vRunner
from api.engine.model.weight_source import NetworkSource
from api.engine.model.weights import part_sums, raw_bytes, weights_of
from api.engine.process import release_freed_memory

logger = logging.getLogger(__name__)


class CheckpointIntegrity:
    """`load_network` loads the transformers network again, on the device of the runner."""

    def __init__(
        self,
        runner: Glm4vRunner,
        image_token_id: int,
        load_network: Callable[[], Any],
        every_s: float,
        reference: Comparison,
    ) -> None:
        self.every_s, self.reference = every_s, reference
        self._runner, self._image_token_id = runner, image_token_id
        self._load_network = load_network

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
        both = _free_bytes(self._runner) > 2 * size  # the network as loaded, and as the operations pack it
        if not both:
            logger.warning("event=reload old_weights=freed_first size_gib=%.1f", size / GIB)
            self._runner.release_weights()
            release_freed_memory()
        try:
            network = self._load_network()
        except Exception as error:
            if not both:
                raise
            raise LoadError(f"the weights cannot be loaded: {type(error).__name__}: {error}") from None
        self._runner.take_weights(NetworkSource(network))
        del network
        release_freed_memory()
        logger.info("event=weights_reloaded seconds=%.2f", time.monotonic() - began)


def _free_bytes(runner: Glm4vRunner) -> int:
    if runner.decoder.device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return free_memory_bytes()
