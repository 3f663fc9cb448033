"""Where a model's weights come from: tensors by the names that transformers gives them, on the computing device.

The decoder and the vision encoder ask for each tensor once and arrange it as they need it, so that a source which reads
files never holds more than one layer besides the result.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class WeightSource(Protocol):
    config: Any  # Glm4vConfig or one of the same shape, of transformers
    device: torch.device
    dtype: torch.dtype  # of every tensor

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        """The tensor of this name, like `model.visual.blocks.0.attn.qkv.weight`; `on_host`: in host memory and not on the
        device. Raises KeyError if there is none."""

    def find(self, name: str) -> torch.Tensor | None:
        """The tensor of this name, or None if the checkpoint has none: the bias of some layers."""
