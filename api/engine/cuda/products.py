"""Products of few rows with a matrix in Triton: as quick as the matrix can be read, whatever the number of rows.

    few_rows_product(x, weight, bias=None, scales=None, gated=False) -> [rows, features]

May be captured in a CUDA graph. A weight in float8 is read as such and multiplied in the number format of x, which loses
nothing of x and needs half of the memory traffic. A row's result does not depend on the other rows of its launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MOST_ROWS = 64  # beyond, products are bound by arithmetic


class ProductPlan(NamedTuple):
    """A program computes `features` features of a result, from `depth` elements of a row at a time."""

    features: int = 16
    depth: int = 128
    warps: int = 4
    stages: int = 4


def tile_of(rows: int) -> int:
    """Rows that are multiplied at once: results of fewer take as long."""
    return min(max(triton.next_power_of_2(rows), 16), MOST_ROWS)


def few_rows_product(
    x: torch.Tensor,  # [rows, depth], contiguous
    weight: torch.Tensor,  # [features, depth], contiguous, in the number format of x or in float8
    bias: torch.Tensor | None = None,  # [features]
    scales: torch.Tensor | None = None,  # float32 [features] of a weight in float8
    gated: bool = False,  # then the result is silu(first half of the features) * second half
    out: torch.Tensor | None = None,
    plan: ProductPlan | None = None,
) -> torch.Tensor:
    """x weight^T * scales + bias: [rows, features], if gated [rows, features / 2]."""
    rows, depth = x.shape
    width = len(weight) // 2 if gated else len(weight)
    plan = plan or ProductPlan()
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device) if out is None else out
    tile = tile_of(rows)
    _product[(triton.cdiv(width, plan.features), triton.cdiv(rows, tile))](
        x, weight, x if bias is None else bias, x if scales is None else scales, out, rows, width, depth,
        GATED=gated, BIASED=bias is not None, SCALED=scales is not None, WHOLE=depth % plan.depth == 0,
        TILE=tile, FEATURES=plan.features, DEPTH=plan.depth, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, weight, bias, scales, out, rows, width, depth,
    GATED: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr,
    TILE: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    element = tl.arange(0, DEPTH)
    real = row < rows
    # Of features beyond the last, the last is read again.
    place = tl.minimum(feature, width - 1).to(tl.int64)[:, None] * depth + element[None, :]
    x += row.to(tl.int64)[:, None] * depth + element[None, :]
    gate = tl.zeros([TILE, FEATURES], tl.float32)
    up = tl.zeros([TILE, FEATURES], tl.float32)
    other = width.to(tl.int64) * depth
    for at in range(0, depth, DEPTH):
        if WHOLE:
            values = tl.load(x + at, mask=real[:, None], other=0.0)
            matrix = tl.load(weight + place + at)
            if GATED:
                second = tl.load(weight + other + place + at)
        else:
            inside = (element < depth - at)[None, :]
            values = tl.load(x + at, mask=real[:, None] & inside, other=0.0)
            matrix = tl.load(weight + place + at, mask=inside, other=0.0)
            if GATED:
                second = tl.load(weight + other + place + at, mask=inside, other=0.0)
        gate = tl.dot(values, tl.trans(matrix.to(values.dtype)), gate, input_precision="ieee")
        if GATED:
            up = tl.dot(values, tl.trans(second.to(values.dtype)), up, input_precision="ieee")
    kind = out.dtype.element_ty
    inside = feature < width
    if SCALED:
        gate *= tl.load(scales + feature, mask=inside, other=0.0)[None, :]
    if BIASED:
        gate += tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if SCALED:
            up *= tl.load(scales + width + feature, mask=inside, other=0.0)[None, :]
        if BIASED:
            up += tl.load(bias + width + feature, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate = gate.to(kind).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
    place = row.to(tl.int64)[:, None] * width + feature[None, :]
    tl.store(out + place, gate.to(kind), mask=real[:, None] & inside[None, :])
