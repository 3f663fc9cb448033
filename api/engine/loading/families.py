"""The families of models that the engine computes, by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Family:
    class_name: str  # in transformers


FAMILIES: Mapping[str, Family] = {
    "glm4v": Family("Glm4vForConditionalGeneration"),
    "glm46v": Family("Glm46VForConditionalGeneration"),
}


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a model with this config, as transformers makes it; a head that shares the
    embeddings is not among them. Takes no memory for the weights."""
    with torch.device("meta"):
        network = getattr(transformers, FAMILIES[config.model_type].class_name)(config)
    return {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
