"""Products with a matrix of weights on a CUDA device: cuBLAS, with what is around the product in one kernel each, or for
few rows one kernel for all of it where that was found to be quicker."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from api.engine.cuda.product_plans import ProductPlans
from api.engine.cuda.products import ProductPlan, few_rows_product
from api.engine.cuda.quantization import quantize_rows, rescale
from api.engine.cuda.rows import silu_mul
from api.engine.model.quantized_linear import Fp8Linear


class CudaLinear:
    """Weights in the model's own number format; if gated, `activate` is silu(first half of a row) * second half."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        activate: Callable[[torch.Tensor], torch.Tensor] = silu_mul,
        plans: ProductPlans | None = None,
    ) -> None:
        self._activate, self._plans = activate, plans or ProductPlans()
        self.out_features, self.in_features = weight.shape
        self._weight, self._gated = weight.detach().contiguous(), gated
        self._bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if (plan := self._plans.plan(len(x), self._weight)) is not None:
            return self.few_rows(x, plan)
        y = F.linear(x, self._weight, self._bias)
        return self._activate(y) if self._gated else y

    scales: torch.Tensor | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """The weights [out_features, in_features] as they are kept."""
        return self._weight

    def few_rows(self, x: torch.Tensor, plan: ProductPlan) -> torch.Tensor:
        return few_rows_product(x.contiguous(), self._weight, self._bias, None, self._gated, plan=plan)


class CudaFp8Linear(Fp8Linear):
    """The arithmetic of Fp8Linear in three kernels: inputs to float8, the product, its scales, bias and activation.

    Few rows are multiplied as they are, which is more exact."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        plans: ProductPlans | None = None,
    ) -> None:
        super().__init__(weight, bias, gated)
        self._plans = plans or ProductPlans()

    @property
    def matrix(self) -> torch.Tensor:
        """The weights [out_features, in_features] as they are kept."""
        return self._values

    @property
    def scales(self) -> torch.Tensor:
        """[out_features], by which the outputs of the kept weights are multiplied."""
        return self._scales

    def few_rows(self, x: torch.Tensor, plan: ProductPlan) -> torch.Tensor:
        return few_rows_product(x.contiguous(), self._values, self._bias, self._scales, self._gated, plan=plan)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if (plan := self._plans.plan(len(x), self._values)) is not None:
            return self.few_rows(x, plan)
        values, scales = quantize_rows(x.contiguous())
        return rescale(self.product(values, x.dtype), scales, self._scales, self._bias, self._gated, x.dtype)
