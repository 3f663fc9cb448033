"""Products with quantised weights: float8, NF4 and 8-bit integers. A matrix is quantised row by row when it is made, so
that nothing larger than a block of it is held besides it.

Relative errors of the products on Gaussian weights (docs/model.md has those of the answers): NF4 9.3 %, float8 3.7 %,
8-bit integers 0.6 %.
"""

from __future__ import annotations

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


class Fp8Linear:
    """Weights and inputs in float8 (e4m3). The product is computed with scales of one, which every device from 8.9 on
    can do; the scales of rows and columns factor out and are multiplied afterwards. Elsewhere than on CUDA the same
    arithmetic is emulated: slow, for tests.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self._gated = gated
        self._bias = None if bias is None else bias.detach().contiguous()
        self._values = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
        self._scales = torch.empty(self.out_features, dtype=torch.float32, device=weight.device)
        for start in range(0, self.out_features, ROWS_AT_ONCE):
            values, scales = quantize_rows(weight[start : start + ROWS_AT_ONCE])
            self._values[start : start + ROWS_AT_ONCE] = values
            self._scales[start : start + ROWS_AT_ONCE] = scales[:, 0]
        self._one = torch.ones((), dtype=torch.float32, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, scales = quantize_rows(x)
        y = (self.product(values, x.dtype).float() * scales).mul_(self._scales)
        if self._bias is not None:
            y += self._bias
        y = y.to(x.dtype)
        return gate(y) if self._gated else y

    def product(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """values [rows, in_features] in float8 -> [rows, out_features] without scales, in a format that holds them."""
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # float16 would overflow
        if values.device.type == "cpu":
            return F.linear(values.float(), self._values.float()).to(wide)
        return torch._scaled_mm(values, self._values.t(), scale_a=self._one, scale_b=self._one, out_dtype=wide)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, size] -> float8 [rows, size] and float32 scales [rows, 1]; x is about values * scales."""
    exact = x.float()
    scales = exact.abs().amax(dim=-1, keepdim=True).div_(FLOAT8_MAX).clamp_(min=SMALLEST_SCALE)
    return (exact / scales).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scales


class Int8Linear:
    """Weights as 8-bit integers with a scale for each output; inputs stay as they are. For the vision encoder, whose many
    rows outweigh the conversion of the weights, done for a part of the matrix at a time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self._gated = gated
        self._bias = None if bias is None else bias.detach().contiguous()
        self._values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self._scales = torch.empty(self.out_features, dtype=weight.dtype, device=weight.device)
        for start in range(0, self.out_features, ROWS_AT_ONCE):
            part = weight[start : start + ROWS_AT_ONCE].float()
            # Divided by the scale as it is stored, so that its rounding costs nothing.
            scales = part.abs().amax(dim=-1).div_(127).clamp_(min=SMALLEST_SCALE).to(weight.dtype)
            self._values[start : start + ROWS_AT_ONCE] = (part / scales.float()[:, None]).round_().clamp_(-127, 127)
            self._scales[start : start + ROWS_AT_ONCE] = scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = _by_parts(x, self.out_features, self._part)
        y *= self._scales
        if self._bias is not None:
            y += self._bias
        return gate(y) if self._gated else y

    def _part(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        return F.linear(x, self._values[start:end].to(x.dtype))


class Nf4Linear:
    """Weights in NF4, 64 of which share a float32 scale, by bitsandbytes, which multiplies few rows without unpacking."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self._gated = gated
        self._bias = None if bias is None else bias.detach().contiguous()
        ops = bitsandbytes_ops()
        self._packed, self._scales = ops.quantize_4bit(weight.detach().contiguous(), NF4_BLOCK, "nf4", torch.uint8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._part(x, 0, self.out_features) if len(x) <= FUSED_ROWS else _by_parts(x, self.out_features, self._part)
        if self._bias is not None:
            y += self._bias
        return gate(y) if self._gated else y

    def _part(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The outputs from `start` to `end`."""
        columns = self.in_features
        packed = self._packed[start * columns // 2 : end * columns // 2]
        scales = self._scales[start * columns // NF4_BLOCK : end * columns // NF4_BLOCK]
        shape = (end - start, columns)
        return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, scales, NF4_BLOCK, "nf4", None)


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
