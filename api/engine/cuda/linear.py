"""Products with a matrix of weights on a CUDA device: cuBLAS, with what is around the product in one kernel each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

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
    ) -> None:
        self._activate = activate
        self.out_features, self.in_features = weight.shape
        self._weight, self._gated = weight.detach().contiguous(), gated
        self._bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self._weight, self._bias)
        return self._activate(y) if self._gated else y


class CudaFp8Linear(Fp8Linear):
    """The arithmetic of Fp8Linear in three kernels: inputs to float8, the product, its scales, bias and activation."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, scales = quantize_rows(x.contiguous())
        return rescale(self.product(values, x.dtype), scales, self._scales, self._bias, self._gated, x.dtype)
