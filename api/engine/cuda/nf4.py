"""Products of few rows with a matrix in NF4, in Triton: the matrix is unpacked where it is multiplied.

    nf4_product(x, values, scales, features, bias=None) -> [rows, features]

`values` and `scales` are as bitsandbytes packs a matrix [features, depth]: two weights in a byte, the first in its upper
half, and the largest magnitude of every 64 weights of a row. May be captured in a CUDA graph. A row's result does not
depend on the other rows of its launch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK = 64  # weights that share a scale
LEAST_ROWS = 3  # bitsandbytes is quicker for one and two (H200: 80 against 100 µs for two, 186 against 100 for four)
MOST_ROWS = 64  # beyond, it pays to unpack the matrix once for all rows
PROGRAMS = 512  # about four for each multiprocessor of a large card; fewer of them share their depth out
MOST_SPLITS = 8
# The weights of NF4: equally probable quantiles of the normal distribution.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4Plan(NamedTuple):
    """A program computes `features` features of a result. `splits` of the depth; None: as many as keep a large card busy,
    whatever the number of rows."""

    features: int = 64
    warps: int = 4
    splits: int | None = None


def nf4_product(
    x: torch.Tensor,  # [rows, depth], contiguous, in bfloat16 or float16
    values: torch.Tensor,  # uint8 [features * depth / 2]
    scales: torch.Tensor,  # float32 [features * depth / 64]
    features: int,
    bias: torch.Tensor | None = None,  # [features]
    plan: Nf4Plan | None = None,
) -> torch.Tensor:
    """x weight^T + bias: [rows, features], for up to 64 rows. Parts of the depth are added in a fixed order."""
    rows, depth = x.shape
    plan = plan or Nf4Plan()
    tile, programs = tile_of(rows), triton.cdiv(features, plan.features)
    blocks = depth // BLOCK
    of_split = triton.cdiv(blocks, plan.splits or min(max(PROGRAMS // programs, 1), MOST_SPLITS))
    splits = triton.cdiv(blocks, of_split)  # none of them empty
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    parts = out if splits == 1 else torch.empty(splits, rows, features, dtype=torch.float32, device=x.device)
    table = unpacked_bytes(x.dtype, x.device)
    _product[(programs, splits)](
        x, values, scales, table, out if bias is None else bias, parts, rows, features, depth, depth // 2,
        blocks, of_split,
        BIASED=bias is not None and splits == 1, TILE=tile, FEATURES=plan.features, BLOCK=BLOCK,
        num_warps=plan.warps, num_stages=1,
    )  # fmt: skip
    if splits > 1:
        block = min(triton.next_power_of_2(features), 1024)
        _join[(rows, triton.cdiv(features, block))](
            parts, out if bias is None else bias, out, rows, features,
            BIASED=bias is not None, SPLITS=splits, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def tile_of(rows: int) -> int:
    """Rows that are multiplied at once: results of fewer take as long."""
    return min(max(triton.next_power_of_2(rows), 16), MOST_ROWS)


@cache
def unpacked_bytes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """int32 [256]: the two weights of each byte in a 16-bit format, the first in the lower half as in memory."""
    code = torch.tensor(CODE, dtype=dtype)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
    return pairs.view(torch.int32).flatten().to(device)


@triton.jit(do_not_specialize=["rows", "blocks", "of_split"])
def _product(
    x, values, scales, table, bias, parts, rows, features, depth, row_bytes, blocks, of_split,
    BIASED: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights are the left factor: tensor cores can read that one from registers, where it is unpacked."""
    split = tl.program_id(1)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.arange(0, TILE)
    inside, real = feature < features, row < rows
    # Features beyond the last read the last one's weights, whose results are not stored: loads need no mask.
    source = tl.minimum(feature, features - 1).to(tl.int64)  # of a matrix beyond 2 GiB too
    byte = values + source[:, None] * row_bytes + tl.arange(0, BLOCK // 2)[None, :]
    scale = scales + source * blocks
    number = x + row[None, :] * depth + tl.arange(0, BLOCK)[:, None]
    total = tl.zeros([FEATURES, TILE], tl.float32)
    start, end = split * of_split, tl.minimum((split + 1) * of_split, blocks)
    packed, after = tl.load(byte + start * (BLOCK // 2)), tl.load(byte + tl.minimum(start + 1, end - 1) * (BLOCK // 2))
    rows_of_block = tl.load(number + start * BLOCK, mask=real[None, :], other=0.0)
    shared = tl.load(scale + start)
    # Loads are two rounds and one round ahead of their use. Left to itself, Triton would copy the table's entries to
    # shared memory, one by one.
    for at in tl.range(start, end, num_stages=1):
        pair = tl.load(table + packed.to(tl.int32))
        packed, after = after, tl.load(byte + tl.minimum(at + 2, end - 1) * (BLOCK // 2))
        first, second = (pair & 0xFFFF).to(tl.int16), (pair >> 16).to(tl.int16)
        weight = tl.join(first, second).reshape(FEATURES, BLOCK).to(x.dtype.element_ty, bitcast=True)
        product = tl.dot(weight, rows_of_block, input_precision="ieee")
        total += product * shared[:, None]
        following = tl.minimum(at + 1, end - 1)
        rows_of_block = tl.load(number + following * BLOCK, mask=real[None, :], other=0.0)
        shared = tl.load(scale + following)
    if BIASED:
        total += tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = (split * rows + row).to(tl.int64)[None, :] * features + feature[:, None]
    tl.store(parts + place, total.to(parts.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit(do_not_specialize=["rows"])
def _join(
    parts, bias, out, rows, features,
    BIASED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + row) * features + feature, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + feature, total.to(out.dtype.element_ty), mask=inside)
