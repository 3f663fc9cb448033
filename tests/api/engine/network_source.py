"""A source of weights for tests: a network of transformers that is in memory."""

from __future__ import annotations

from typing import Any

import torch


class NetworkSource:
    """The weights of a network of transformers that is in memory."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.config: Any = network.config
        self._tensors = {name: tensor.detach() for name, tensor in network.named_parameters(remove_duplicate=False)}
        first = self.take("model.language_model.embed_tokens.weight")
        self.device, self.dtype = first.device, first.dtype

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        return self._tensors[name].cpu() if on_host else self._tensors[name]

    def find(self, name: str) -> torch.Tensor | None:
        return self._tensors.get(name)
