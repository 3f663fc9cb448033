"""Work on the rows of a matrix in Triton: norms and the activation of an MLP.

    add_norm(x, delta, delta_norm, next_norm, eps) -> (y, normed)
    rms_norm(x, norm, eps) -> normed
    add_norm_float8(x, delta, delta_norm, next_norm, eps) -> (y, normed in float8)
    add_rms_norm(x, delta, norm, eps) -> (y, normed)
    silu_mul(gate_up) -> [rows, inner]

All may be captured in a CUDA graph. Sums are in float32; results are rounded where torch's operations round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from api.engine.cuda.quantization import LARGEST, SMALLEST_SCALE, Float8Rows, empty_float8, to_float8


def add_norm(
    x: torch.Tensor,  # [rows, hidden], contiguous, as are the others
    delta: torch.Tensor,  # [rows, hidden]
    delta_norm: torch.Tensor,  # [hidden]
    next_norm: torch.Tensor,  # [hidden]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + rms_norm(delta, delta_norm) and rms_norm(y, next_norm)."""
    return _normed(x, delta, delta_norm, next_norm, eps)


def add_norm_float8(
    x: torch.Tensor, delta: torch.Tensor, delta_norm: torch.Tensor, next_norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, Float8Rows]:
    """`add_norm`, and `quantize_rows` of the normed rows."""
    y = torch.empty_like(x)
    values, scales = empty_float8(x.shape[0], x.shape[1], x.device)
    _launch_add_norm(x, delta, delta_norm, next_norm, y, values, scales, eps)
    return y, Float8Rows(values, scales, x.dtype)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + delta and rms_norm(y, norm)."""
    return _normed(x, delta, None, norm, eps)


def rms_norm(x: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """rms_norm of x [rows, hidden]."""
    return _normed(x, None, None, norm, eps)[1]


def silu_mul(
    gate_up: torch.Tensor,  # [rows, 2 * inner], contiguous
    out: torch.Tensor | None = None,  # [rows, inner], contiguous
) -> torch.Tensor:
    """silu(first half of a row) * second half: [rows, inner]."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    block = min(triton.next_power_of_2(inner), 1024)
    _silu_mul[(rows, triton.cdiv(inner, block))](gate_up, out, inner, BLOCK=block, num_warps=4)
    return out


def _normed(
    x: torch.Tensor, delta: torch.Tensor | None, delta_norm: torch.Tensor | None, norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    _launch_add_norm(x, delta, delta_norm, norm, y, normed, None, eps)
    return y, normed


def _launch_add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    delta_norm: torch.Tensor | None,
    norm: torch.Tensor,
    y: torch.Tensor,
    normed: torch.Tensor,
    scales: torch.Tensor | None,
    eps: float,
) -> None:
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    _add_norm[(rows,)](
        x, x if delta is None else delta, norm if delta_norm is None else delta_norm, norm, y, normed,
        norm if scales is None else scales, hidden, eps,
        ADDED=delta is not None, DELTA_NORMED=delta_norm is not None, FLOAT8=scales is not None, BLOCK=block,
        LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip


@triton.jit
def _add_norm(
    x, delta, delta_norm, norm, y, normed, scales, hidden, eps,
    ADDED: tl.constexpr, DELTA_NORMED: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    real = column < hidden
    kind = y.dtype.element_ty
    total = tl.load(x + row + column, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        added = tl.load(delta + row + column, mask=real, other=0.0).to(tl.float32)
        if DELTA_NORMED:
            weight = tl.load(delta_norm + column, mask=real, other=0.0).to(tl.float32)
            added = added * tl.rsqrt(tl.sum(added * added, 0) / hidden + eps) * weight
            added = added.to(kind).to(tl.float32)
        rounded = (total + added).to(kind)
        tl.store(y + row + column, rounded, mask=real)
        total = rounded.to(tl.float32)
    weight = tl.load(norm + column, mask=real, other=0.0).to(tl.float32)
    result = total * tl.rsqrt(tl.sum(total * total, 0) / hidden + eps) * weight
    if FLOAT8:
        value, scale = to_float8(result.to(kind).to(tl.float32), LARGEST, SMALLEST)
        tl.store(normed + row + column, value.to(normed.dtype.element_ty), mask=real)
        tl.store(scales + tl.program_id(0), scale)
    else:
        tl.store(normed + row + column, result.to(kind), mask=real)


@triton.jit
def _silu_mul(gate_up, out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < inner
    gate = tl.load(gate_up + row * 2 * inner + column, mask=real, other=0.0)
    up = tl.load(gate_up + row * 2 * inner + inner + column, mask=real, other=0.0)
    exact = gate.to(tl.float32)
    active = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype)
    tl.store(out + row * inner + column, (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=real)
