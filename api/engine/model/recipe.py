"""Recipes: in which number format the weights of each part of a model are kept.

bf16: the checkpoint's own. fp8: the products of the text model in float8, from compute capability 8.9 on. nf4: those in
four bits, from 7.5 on and on the CPU. Embeddings and norms are never quantised; the vision encoder is on small cards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from api.engine.model.linear import Linear, Role, TorchLinear
from api.engine.model.quantized_linear import FLOAT8_MULTIPLE, NF4_BLOCK, Fp8Linear, Int8Linear, Nf4Linear

Weights = Literal["bf16", "fp8", "nf4"]
Format = Literal["plain", "fp8", "int8", "nf4"]  # plain: the number format of the activations
Linears = Mapping[Format, Callable[..., Linear]]
LINEARS: Linears = {"plain": TorchLinear, "fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}
NEEDS_CAPABILITY: Mapping[Weights, tuple[int, int]] = {"bf16": (7, 5), "fp8": (8, 9), "nf4": (7, 5)}


@dataclass(frozen=True)
class Recipe:
    """The formats of the text model's layers, of the head and of the vision encoder."""

    name: Weights
    text: Format = "plain"
    head: Format = "plain"
    vision: Format = "plain"
    host_embeddings: bool = False  # the table of embeddings stays in host memory, from which the GPU reads rows

    def format_of(self, role: Role, rows: int, columns: int) -> Format:
        """The format of a matrix [rows, columns]; plain where its shape does not fit the other."""
        chosen: Format = {"text": self.text, "head": self.head, "vision": self.vision}[role]
        if chosen == "nf4" and columns % NF4_BLOCK:
            return "plain"
        if chosen == "fp8" and (rows % FLOAT8_MULTIPLE or columns % FLOAT8_MULTIPLE):
            return "plain"
        return chosen

    def linear(
        self,
        role: Role,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gated: bool,
        linears: Linears = LINEARS,
    ) -> Linear:
        """The product with a matrix [out_features, in_features]. `linears`: the class for each format, which a device's
        operations may replace by their own."""
        return linears[self.format_of(role, *weight.shape)](weight, bias, gated)

    def bytes_of(self, rows: int, columns: int, role: Role, itemsize: int = 2) -> int:
        """Bytes that a matrix [rows, columns] takes, scales included and a bias not. `itemsize` of the plain format."""
        match self.format_of(role, rows, columns):
            case "fp8":
                return rows * columns + 4 * rows + 4
            case "int8":
                return rows * columns + itemsize * rows
            case "nf4":
                return rows * columns // 2 + rows * columns // NF4_BLOCK * 4
            case _:
                return rows * columns * itemsize


def make_recipe(weights: Weights, small: bool = False, capability: tuple[int, int] | None = None) -> Recipe:
    """The recipe of that name. `small`: the vision encoder in 8 bits and the embeddings in host memory, for cards below
    12 GB. `capability` of the GPU, None for the CPU."""
    vision: Format = "plain"
    if small:
        vision = "fp8" if capability is not None and capability >= NEEDS_CAPABILITY["fp8"] else "int8"
    text: Format = "plain" if weights == "bf16" else weights
    return Recipe(weights, text, text, vision, host_embeddings=small)


BF16 = make_recipe("bf16")
