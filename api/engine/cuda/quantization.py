"""Products in float8 around the product itself, in Triton, for devices from 8.9 on.

    quantize_rows(x) -> (values, scales)
    rescale(product, row_scales, column_scales, bias=None, gated=False, dtype=torch.bfloat16) -> [rows, features]

A row is divided by its scale, so that its largest element becomes the largest float8 number. Scales factor out of a
product: multiply values with scales of 1, then `rescale`. All may be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

KIND = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 1e-12  # of a row of zeros


class Float8Rows(NamedTuple):
    """Rows on their way to a product in float8."""

    values: torch.Tensor  # float8 [rows, size]
    scales: torch.Tensor  # float32 [rows, 1]
    dtype: torch.dtype  # the number format that they were in, and that of the product's result


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, size], contiguous -> float8 [rows, size] and float32 scales [rows, 1]: x is about values * scales."""
    rows, size = x.shape
    values, scales = empty_float8(rows, size, x.device)
    block = triton.next_power_of_2(size)
    _quantize[(rows,)](
        x, values, scales, size, BLOCK=block, LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return values, scales


def rescale(
    product: torch.Tensor,  # [rows, features], contiguous: of float8 values
    row_scales: torch.Tensor,  # float32 [rows, 1]
    column_scales: torch.Tensor,  # float32 [features] or [1, features]
    bias: torch.Tensor | None = None,  # [features]
    gated: bool = False,  # then the result is silu(first half) * second half
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """product * row_scales * column_scales + bias: [rows, features], if gated [rows, features / 2]."""
    rows, features = product.shape
    width = features // 2 if gated else features
    out = torch.empty(rows, width, dtype=dtype, device=product.device)
    block = min(triton.next_power_of_2(width), 1024)
    _rescale[(rows, triton.cdiv(width, block))](
        product, row_scales, column_scales, product if bias is None else bias, out, width, features,
        BIASED=bias is not None, GATED=gated, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def empty_float8(rows: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for values and scales."""
    return (
        torch.empty(rows, size, dtype=KIND, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )


@triton.jit
def to_float8(element, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """A row of float32, zero beyond its end: divided by its scale, and the scale."""
    scale = tl.maximum(tl.max(tl.abs(element), 0) / LARGEST, SMALLEST)
    return tl.minimum(tl.maximum(element / scale, -LARGEST), LARGEST), scale


@triton.jit
def _gated(product, scale, column_scales, bias, like, inner, column, real, BIASED: tl.constexpr):
    """silu(first half) * second half of a row of a product after its scales and bias, rounded as `like`: float32."""
    kind = like.dtype.element_ty
    gate = tl.load(product + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(product + inner + column, mask=real, other=0.0).to(tl.float32)
    gate = gate * scale * tl.load(column_scales + column, mask=real, other=0.0)
    up = up * scale * tl.load(column_scales + inner + column, mask=real, other=0.0)
    if BIASED:
        gate += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
        up += tl.load(bias + inner + column, mask=real, other=0.0).to(tl.float32)
    gate = gate.to(kind).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    return (active * up.to(kind).to(tl.float32)).to(kind).to(tl.float32)


@triton.jit
def _quantize(x, values, scales, size, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < size
    element = tl.load(x + row * size + column, mask=real, other=0.0).to(tl.float32)
    element, scale = to_float8(element, LARGEST, SMALLEST)
    tl.store(values + row * size + column, element.to(values.dtype.element_ty), mask=real)
    tl.store(scales + row, scale)


@triton.jit
def _rescale(
    product, row_scales, column_scales, bias, out, width, features,
    BIASED: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    kind = out.dtype.element_ty
    scale = tl.load(row_scales + row)
    if GATED:
        result = _gated(product + row * features, scale, column_scales, bias, out, width, column, real, BIASED)
    else:
        result = tl.load(product + row * features + column, mask=real, other=0.0).to(tl.float32)
        result = result * scale * tl.load(column_scales + column, mask=real, other=0.0)
        if BIASED:
            result += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, result.to(kind), mask=real)
