"""Products with a matrix of weights on a CUDA device: cuBLAS, with what is around the product in one kernel each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from api.engine.cuda.nf4 import LEAST_ROWS, MOST_ROWS, nf4_product
from api.engine.cuda.quantization import Float8Rows, quantize_rows, rescale
from api.engine.cuda.rows import silu_mul
from api.engine.model.quantized_linear import Fp8Linear, Nf4Linear, Parts


class CudaLinear:
    """Weights in the model's own number format; if gated, `activate` is silu(first half of a row) * second half."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        activate: Callable[[torch.Tensor], torch.Tensor] = silu_mul,
    ) -> None:
        self._activate = activate
        self.out_features, self.in_features = weight.shape
        self._weight, self._gated = weight.detach().contiguous(), gated
        self._bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self._weight, self._bias)
        return self._activate(y) if self._gated else y


class CudaFp8Linear(Fp8Linear):
    """The arithmetic of Fp8Linear in three kernels: inputs to float8, the product, its scales, bias and activation.

    Inputs may already be in float8. Torch computes while `uses_kernels` says no."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        parts: Parts | None = None,
        uses_kernels: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(weight, bias, gated, parts)
        self._uses_kernels = uses_kernels

    def __call__(self, x: torch.Tensor | Float8Rows) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and not self._uses_kernels():
            return super().__call__(x)
        rows = _in_float8(x)
        product = self.product(rows.values, rows.dtype)
        return rescale(product, rows.scales, self._scales, self._bias, self._gated, rows.dtype)


def _in_float8(x: torch.Tensor | Float8Rows) -> Float8Rows:
    return Float8Rows(*quantize_rows(x.contiguous()), x.dtype) if isinstance(x, torch.Tensor) else x


class CudaNf4Linear(Nf4Linear):
    """bitsandbytes multiplies one row, and many; a kernel of this room those between, as long as `uses_kernel` says so."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        parts: Parts | None = None,
        activate: Callable[[torch.Tensor], torch.Tensor] = silu_mul,
        uses_kernel: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(weight, bias, gated, parts)
        self._activate, self._uses_kernel = activate, uses_kernel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not (LEAST_ROWS <= len(x) <= MOST_ROWS and x.itemsize == 2 and self._uses_kernel()):
            return super().__call__(x)
        y = nf4_product(x.contiguous(), self._values, self._scales, self.out_features, self._bias)
        return self._activate(y) if self._gated else y
