"""Loads the weights of a checkpoint into a runner, at the start and again while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from api.engine.loaded_model import LoadError
from api.engine.loading.progress import Progress
from api.engine.loading.safetensors_source import Checkpoint, SafetensorsSource
from api.engine.model.weight_source import WeightSource
from api.engine.process import release_freed_memory


@dataclass(frozen=True)
class Weights:
    """A checkpoint, to be computed on `device` in `dtype`."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    @contextmanager
    def open(self, progress: Progress = lambda fraction: None) -> Iterator[WeightSource]:
        """A source that the model takes all its tensors from. Raises LoadError if the files do not fit the config, or
        hold tensors that the model has not taken."""
        self.checkpoint.read_headers()
        source = SafetensorsSource(self.checkpoint, self.device, self.dtype, progress)
        try:
            yield source
        finally:
            source.close()
            release_freed_memory()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
        if rest := source.untaken():
            raise LoadError(f"{self.checkpoint.folder}: the engine does not know what these weights are for: {', '.join(rest[:8])}")
