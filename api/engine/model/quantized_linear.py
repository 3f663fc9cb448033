"""Products with quantised weights: float8, NF4 and 8-bit integers. A matrix is quantised row by row when it is made, so
that nothing larger than a block of it is held besides it.

Relative errors of the products on Gaussian weights (docs/model.md has those of the answers): NF4 9.3 %, float8 3.7 %,
8-bit integers 0.9 %.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from api.engine.model.linear import gate

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
SMALLEST_SCALE = 1e-12  # of a row of zeros
FLOAT8_MULTIPLE = 16  # cuBLASLt multiplies float8 matrices whose sides are multiples of this
NF4_BLOCK = 64  # weights that share a scale
FUSED_ROWS = 4  # up to so many rows bitsandbytes never makes a copy of the matrix in full precision
SCRATCH_BYTES = 128 * 2**20  # most that a product takes for a part of the matrix in full precision
ROWS_AT_ONCE = 8192  # quantised at once

Parts = tuple[torch.Tensor, torch.Tensor]  # values and scales


class QuantizedLinear:
    """What the formats have in common. `parts` are the tensors of an earlier product with the same matrix, which then
    need not hold values."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        parts: Parts | None = None,
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self._gated = gated
        self._bias = None if bias is None else bias.detach().contiguous()
        self._values, self._scales = parts or self._quantize(weight.detach())

    @property
    def parts(self) -> Parts:
        """The quantised matrix, without the bias."""
        return self._values, self._scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product(x)
        if self._bias is not None:
            y += self._bias
        y = y.to(x.dtype)
        return gate(y) if self._gated else y

    def _quantize(self, weight: torch.Tensor) -> Parts:
        raise NotImplementedError

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] -> [rows, out_features] in its number format or a wider one."""
        raise NotImplementedError


class Fp8Linear(QuantizedLinear):
    """Weights and inputs in float8 (e4m3). The product is computed with scales of one, which every device from 8.9 on
    can do; the scales of rows and columns factor out and are multiplied afterwards. Elsewhere than on CUDA the same
    arithmetic is emulated: slow, for tests.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gated: bool = False,
        parts: Parts | None = None,
    ) -> None:
        super().__init__(weight, bias, gated, parts)
        self._one = torch.ones((), dtype=torch.float32, device=self._values.device)

    def product(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """values [rows, in_features] in float8 -> [rows, out_features] without scales, in a format that holds them."""
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # float16 would overflow
        if values.device.type == "cpu":
            return F.linear(values.float(), self._values.float()).to(wide)
        return torch._scaled_mm(values, self._values.t(), scale_a=self._one, scale_b=self._one, out_dtype=wide)

    def _quantize(self, weight: torch.Tensor) -> Parts:
        values = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
        scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values[part], found = quantize_rows(weight[part])
            scales[part] = found[:, 0]
        return values, scales

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        values, scales = quantize_rows(x)
        return (self.product(values, x.dtype).float() * scales).mul_(self._scales)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, size] -> float8 [rows, size] and float32 scales [rows, 1]; x is about values * scales."""
    exact = x.float()
    scales = exact.abs().amax(dim=-1, keepdim=True).div_(FLOAT8_MAX).clamp_(min=SMALLEST_SCALE)
    return (exact / scales).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scales


class Int8Linear(QuantizedLinear):
    """Weights as 8-bit integers with a scale for each output; inputs stay as they are. For the vision encoder, whose many
    rows outweigh the conversion of the weights, done for a part of the matrix at a time."""

    def _quantize(self, weight: torch.Tensor) -> Parts:
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            part = weight[rows].float()
            # Divided by the scale as it is stored, so that its rounding costs nothing.
            scales[rows] = part.abs().amax(dim=-1).div_(127).clamp_(min=SMALLEST_SCALE)
            values[rows] = (part / scales[rows].float()[:, None]).round_().clamp_(-127, 127)
        return values, scales

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return _by_parts(x, self.out_features, self._part).mul_(self._scales)

    def _part(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        return F.linear(x, self._values[start:end].to(x.dtype))


class Nf4Linear(QuantizedLinear):
    """Weights in NF4, 64 of which share a float32 scale, by bitsandbytes, which multiplies few rows without unpacking."""

    def _quantize(self, weight: torch.Tensor) -> Parts:
        return bitsandbytes_ops().quantize_4bit(weight.contiguous(), NF4_BLOCK, "nf4", torch.uint8)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= FUSED_ROWS:
            return self._part(x, 0, self.out_features)
        return _by_parts(x, self.out_features, self._part)

    def _part(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The outputs from `start` to `end`."""
        columns = self.in_features
        values = self._values[start * columns // 2 : end * columns // 2]
        scales = self._scales[start * columns // NF4_BLOCK : end * columns // NF4_BLOCK]
        shape = (end - start, columns)
        return bitsandbytes_ops().gemm_4bit(x, values, shape, scales, NF4_BLOCK, "nf4", None)


@cache
def bitsandbytes_ops() -> Any:
    """The operators of bitsandbytes. Raises ImportError where it is not installed."""
    import bitsandbytes  # noqa: F401  registers them

    return torch.ops.bitsandbytes


def _by_parts(x: torch.Tensor, features: int, part: Any) -> torch.Tensor:
    """part(x, start, end) for all outputs, as many at once as SCRATCH_BYTES holds of the matrix in full precision."""
    step = max(SCRATCH_BYTES // (x.shape[-1] * x.element_size()) // NF4_BLOCK, 1) * NF4_BLOCK
    if features <= step:
        return part(x, 0, features)
    y = x.new_empty(len(x), features)
    for start in range(0, features, step):
        end = min(start + step, features)
        y[:, start:end] = part(x, start, end)
    return y
