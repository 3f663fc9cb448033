"""Random weights of a model's exact shape: what is measured with them costs the same as with a checkpoint's own."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from api.engine.loading.families import shapes_of

LOGIT_SPREAD = 3.0  # standard deviation of the logits


class RandomSource:
    """A WeightSource. A tensor is made when it is taken, on the device; the same name and seed give the same values.

    Matrices keep the size of what they multiply, and norms are near one, so activations stay finite in any number of
    layers, and the logits are as spread as those of a model that is sure of something.
    """

    def __init__(self, config: Any, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
        self.config = config
        self.device, self.dtype = torch.device(device), dtype
        self._seed = seed
        self._shapes = shapes_of(config)

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes.values())

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        shape = self._shapes[name]
        device = torch.device("cpu") if on_host else self.device
        generator = torch.Generator(self.device).manual_seed(self._seed * 2**32 + zlib.crc32(name.encode()))
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        if "norm" in name and name.endswith("weight"):
            values.normal_(1.0, 0.1, generator=generator)
        elif len(shape) == 1:
            values.normal_(0.0, 0.02, generator=generator)
        elif "embed_tokens" in name or "position_embedding" in name:
            values.normal_(0.0, 1.0, generator=generator)
        else:
            inputs = torch.Size(shape[1:]).numel()
            spread = LOGIT_SPREAD if name == "lm_head.weight" else 1.0
            values.normal_(0.0, spread * inputs**-0.5, generator=generator)
        return values.to(device)

    def find(self, name: str) -> torch.Tensor | None:
        return self.take(name) if name in self._shapes else None
