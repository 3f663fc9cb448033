"""Rotary position embedding in Triton.

    rotate_store(qkv, cos, sin, kv, slot_mapping, positions=None): in place, keys and values go to the KV cache too
    rotate_image(qkv, cos, sin, heads): in place, the queries and keys of patches

Both may be captured in a CUDA graph. Half-split form over the whole head, `sin` carries the sign, see
`api.engine.model.rotary`. Rounds where `rotate` and `_rotate_exact` of the torch operations round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS_OF_A_PROGRAM = 4


def rotate_store(
    qkv: torch.Tensor,  # [rows, heads + 2 * kv_heads, head_dim], contiguous
    cos: torch.Tensor,  # [rows, head_dim], or with `positions` the table [positions, head_dim]
    sin: torch.Tensor,
    kv: torch.Tensor,  # [tokens, 2 * kv_heads, head_dim], contiguous
    slot_mapping: torch.Tensor,  # int32 or int64 [rows]: row of kv that is written, -1: none
    positions: torch.Tensor | None = None,  # int32 or int64 [rows]: row of cos and sin
) -> torch.Tensor:
    """Rotates queries and keys of qkv in place, and writes keys and values to kv. Returns qkv."""
    rows, total, head_dim = qkv.shape
    kv_heads = kv.shape[1] // 2
    _rotate[(rows, triton.cdiv(total, HEADS_OF_A_PROGRAM))](
        qkv, cos, sin, qkv if positions is None else positions, kv, slot_mapping,
        cos.stride(0), sin.stride(0), total * head_dim,
        ROTATED=total - kv_heads, TOTAL=total, STORED=2 * kv_heads, HALF=head_dim // 2,
        AT_POSITIONS=positions is not None, ROUNDED=cos.dtype != torch.float32, HEADS=HEADS_OF_A_PROGRAM, num_warps=2,
    )  # fmt: skip
    return qkv


def rotate_image(
    qkv: torch.Tensor,  # [patches, 3 * heads * head_dim], contiguous
    cos: torch.Tensor,  # float32 [patches, head_dim]
    sin: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Rotates queries and keys of patches in place, in float32. Returns qkv."""
    patches, width = qkv.shape
    _rotate[(patches, triton.cdiv(2 * heads, HEADS_OF_A_PROGRAM))](
        qkv, cos, sin, qkv, qkv, qkv, cos.stride(0), sin.stride(0), width,
        ROTATED=2 * heads, TOTAL=2 * heads, STORED=0, HALF=width // heads // 6,
        AT_POSITIONS=False, ROUNDED=False, HEADS=HEADS_OF_A_PROGRAM, num_warps=2,
    )  # fmt: skip
    return qkv


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotate(
    qkv, cos, sin, positions, kv, slots,
    cos_row, sin_row, qkv_row,
    ROTATED: tl.constexpr, TOTAL: tl.constexpr, STORED: tl.constexpr, HALF: tl.constexpr,
    AT_POSITIONS: tl.constexpr, ROUNDED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of a row: the first ROTATED of TOTAL are rotated, the last STORED are written to kv."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, HALF)
    real = (head < TOTAL)[:, None]
    place = qkv + row * qkv_row + head[:, None] * (2 * HALF) + dim[None, :]
    low = tl.load(place, mask=real, other=0.0)
    high = tl.load(place + HALF, mask=real, other=0.0)
    at = row
    if AT_POSITIONS:
        at = tl.load(positions + row).to(tl.int64)
    cos += at * cos_row
    sin += at * sin_row
    rotated_low = _turned(low, high, tl.load(cos + dim), tl.load(sin + dim), ROUNDED)
    rotated_high = _turned(high, low, tl.load(cos + HALF + dim), tl.load(sin + HALF + dim), ROUNDED)
    turns = (head < ROTATED)[:, None]
    low = tl.where(turns, rotated_low, low)
    high = tl.where(turns, rotated_high, high)
    tl.store(place, low, mask=real & turns)
    tl.store(place + HALF, high, mask=real & turns)
    if STORED > 0:
        slot = tl.load(slots + row).to(tl.int64)
        if slot >= 0:
            stored = head - (TOTAL - STORED)
            place = kv + slot * (STORED * 2 * HALF) + stored[:, None] * (2 * HALF) + dim[None, :]
            tl.store(place, low, mask=real & (stored >= 0)[:, None])
            tl.store(place + HALF, high, mask=real & (stored >= 0)[:, None])


@triton.jit
def _turned(x, other, cos, sin, ROUNDED: tl.constexpr):
    product = x.to(tl.float32) * cos.to(tl.float32)[None, :]
    if ROUNDED:
        product = product.to(x.dtype).to(tl.float32)
    return (product + other.to(tl.float32) * sin.to(tl.float32)[None, :]).to(x.dtype)
