"""Which products of few rows the kernel of `products` computes, and in what tiles."""

from __future__ import annotations

import torch

from api.engine.cuda.products import MOST_ROWS, ProductPlan, tile_of


class ProductPlans:
    """Plans by the shape and number format of a matrix and the tile of rows. Where there is none, cuBLAS computes."""

    def __init__(self) -> None:
        self._plans: dict[tuple[torch.Size, torch.dtype, int], ProductPlan] = {}

    def plan(self, rows: int, weight: torch.Tensor) -> ProductPlan | None:
        if not self._plans or rows > MOST_ROWS:
            return None
        return self._plans.get((weight.shape, weight.dtype, tile_of(rows)))

    def use(self, rows: int, weight: torch.Tensor, plan: ProductPlan) -> None:
        self._plans[weight.shape, weight.dtype, tile_of(rows)] = plan

    def clear(self) -> None:
        self._plans.clear()
