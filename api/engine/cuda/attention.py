"""Attention over the paged KV cache in Triton.

    paged_decode(q, kv, block_tables, lengths) -> [rows, heads, head_dim]
    paged_prefill(q, kv, block_tables, max_rows, first=...) or (..., starts=..., firsts=...) -> [rows, heads, head_dim]
    decode_scratch(rows, heads, head_dim, device) -> room for paged_decode

Both may be captured in a CUDA graph: they launch a number of programs that depends on shapes alone, read lengths, block
tables and slots on the device and allocate only what is not passed in. A kernel is compiled at its first call for a
device and a number format, which must not happen during a capture: call once before. Numbers that vary from call to call
are not specialised on, so nothing is compiled later: the others are strides of a model's tensors.

`kv` is [tokens, 2 * kv_heads, head_dim], contiguous: a row holds the keys of all key heads, then the values. Token t of a
sequence is row `block_table[t // page_tokens] * page_tokens + t % page_tokens`. Table entries beyond a sequence's last
page and rows beyond its last token are never read. `head_dim` is a power of two from 16 on.

What a row attends to is cut by its own length only, so a result depends neither on the other rows of a launch nor on
the width of the tables.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
SMALLEST_TILE = 16  # rows of a tensor core product


class DecodePlan(NamedTuple):
    """The keys of a row are cut into at most `splits` parts of at least `least` tokens, a multiple of `block`."""

    splits: int = 32
    block: int = 64
    warps: int = 4
    stages: int = 3
    least: int = 64


class PrefillPlan(NamedTuple):
    """`queries` rows of query heads against `keys` tokens at a time."""

    queries: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 2


class DecodeScratch(NamedTuple):
    """Results of each part of a row's keys, and the base 2 logarithm of the sum of its exponentials."""

    parts: torch.Tensor  # float32 [rows, heads, splits, head_dim]
    sums: torch.Tensor  # float32 [rows, heads, splits]


def plans_for(capability: tuple[int, int]) -> tuple[DecodePlan, PrefillPlan]:
    """Plans that fit the shared memory of a device: 64 KiB on Turing, 99 on 8.6, 8.9 and 12.x, else at least 163.

    On Turing Triton does not use the tensor cores, and larger tiles take a minute to compile."""
    if capability < (8, 0):
        return DecodePlan(block=16, stages=1), PrefillPlan(queries=32, keys=32, warps=4, stages=1)
    if capability in ((8, 6), (8, 7), (8, 9)) or capability[0] >= 12:
        return DecodePlan(stages=2), PrefillPlan(queries=64, keys=64, warps=4)
    return DecodePlan(), PrefillPlan(stages=3)


def decode_scratch(
    rows: int, heads: int, head_dim: int, device: torch.device | str, plan: DecodePlan | None = None
) -> DecodeScratch:
    """Room for `paged_decode` of up to `rows` rows."""
    shape = (rows, heads, (plan or DecodePlan()).splits)
    return DecodeScratch(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def paged_decode(
    q: torch.Tensor,  # [rows, heads, head_dim], rows at any distance: may be a part of qkv
    kv: torch.Tensor,  # [tokens, 2 * kv_heads, head_dim]
    block_tables: torch.Tensor,  # int32 or int64 [rows, pages]
    lengths: torch.Tensor,  # int32 or int64 [rows]: tokens that a row attends to; the result of 0 is 0
    page_tokens: int,
    out: torch.Tensor | None = None,  # [rows, heads, head_dim], contiguous
    scratch: DecodeScratch | None = None,  # for at least as many rows
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """One query of each of several sequences. Returns `out`."""
    rows, heads, head_dim = q.shape
    kv_heads = kv.shape[1] // 2
    plan = plan or DecodePlan()
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device) if out is None else out
    scratch = scratch or decode_scratch(rows, heads, head_dim, q.device, plan)
    group = heads // kv_heads
    _decode_part[(plan.splits, kv_heads, rows)](
        q, kv, block_tables, lengths, scratch.parts, scratch.sums,
        q.stride(0), block_tables.stride(0), head_dim**-0.5 * LOG2_E,
        SPLITS=plan.splits, KV_HEADS=kv_heads, GROUP=group, TILE=max(triton.next_power_of_2(group), SMALLEST_TILE),
        HEAD_DIM=head_dim, PAGE=page_tokens, BLOCK=plan.block, LEAST=plan.least,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    _decode_join[(heads, rows)](
        scratch.parts, scratch.sums, lengths, out,
        SPLITS=plan.splits, HEADS=heads, HEAD_DIM=head_dim, BLOCK=plan.block, LEAST=plan.least, num_warps=4,
    )  # fmt: skip
    return out


def paged_prefill(
    q: torch.Tensor,  # [rows, heads, head_dim], rows at any distance: may be a part of qkv
    kv: torch.Tensor,  # [tokens, 2 * kv_heads, head_dim]; those of the rows have been written
    block_tables: torch.Tensor,  # int32 or int64 [sequences, pages]
    max_rows: int,  # at least the most rows of a sequence; only decides how many programs are launched
    page_tokens: int,
    first: int = 0,  # of a single sequence: its tokens before the rows
    starts: torch.Tensor | None = None,  # int32 [sequences + 1]: first row of each sequence, then the number of rows
    firsts: torch.Tensor | None = None,  # int32 [sequences]: tokens of each sequence before its rows
    out: torch.Tensor | None = None,  # [rows, heads, head_dim], contiguous
    plan: PrefillPlan | None = None,
) -> torch.Tensor:
    """Consecutive tokens of one or several sequences: row i of a sequence attends to its first `first + i + 1` tokens.

    Without `starts` all rows are of one sequence. With it, rows from `starts[-1]` on are padding, whose results are left
    as they are. Returns `out`.
    """
    rows, heads, head_dim = q.shape
    kv_heads = kv.shape[1] // 2
    plan = plan or PrefillPlan()
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device) if out is None else out
    tiles = triton.cdiv(max_rows * (heads // kv_heads), plan.queries)
    _prefill[(tiles, kv_heads, len(block_tables))](
        q, kv, block_tables, q if starts is None else starts, q if firsts is None else firsts, out,
        q.stride(0), block_tables.stride(0), first, rows, head_dim**-0.5 * LOG2_E,
        RAGGED=starts is not None, KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, PAGE=page_tokens,
        QUERIES=plan.queries, KEYS=plan.keys, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out


# One compiled kernel serves tables of any width and parts of tensors that begin anywhere.
@triton.jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=["tables", "lengths"])
def _decode_part(
    q, kv, tables, lengths, parts, sums,
    q_row, table_row, scale,
    SPLITS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """All query heads of a key head, for one part of a row's keys."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    size = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK, LEAST)
    start = split * size
    if start >= length:
        return
    end = tl.minimum(start + size, length)
    head = tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_DIM)
    real = (head < GROUP)[:, None]
    head = kv_head * GROUP + head
    query = tl.load(q + row * q_row + head[:, None] * HEAD_DIM + dim[None, :], mask=real, other=0.0)
    best = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    result = tl.zeros([TILE, HEAD_DIM], tl.float32)
    table = tables + row * table_row
    token = start + tl.arange(0, BLOCK)
    page = tl.load(table + token // PAGE, mask=token < end, other=0)
    for at in range(start, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        inside = token < end
        place = (page.to(tl.int64) * PAGE + token % PAGE) * (2 * KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
        place = place[:, None] + dim[None, :]
        key = tl.load(kv + place, mask=inside[:, None], other=0.0)
        value = tl.load(kv + place + KV_HEADS * HEAD_DIM, mask=inside[:, None], other=0.0)
        # One round ahead: loads that wait for another load of the same round are not overlapped with products.
        page = tl.load(table + (token + BLOCK) // PAGE, mask=token + BLOCK < end, other=0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        shrink = tl.exp2(best - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
        best = higher
    part = (row * (KV_HEADS * GROUP) + head) * SPLITS + split
    tl.store(parts + part[:, None] * HEAD_DIM + dim[None, :], result / total[:, None], mask=real)
    tl.store(sums + part, best + tl.log2(total), mask=tl.arange(0, TILE) < GROUP)


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def _decode_join(
    parts, sums, lengths, out,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    size = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK, LEAST)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD_DIM)
    used = split < tl.cdiv(length, size)
    part = (row * HEADS + head) * SPLITS + split
    log = tl.load(sums + part, mask=used, other=-float("inf"))
    best = tl.maximum(tl.max(log, 0), -1e30)  # finite where no part is used
    weight = tl.exp2(log - best)
    values = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=used[:, None], other=0.0)
    total = tl.maximum(tl.sum(weight, 0), 1.0)  # the best part has the weight 1
    result = tl.sum(values * weight[:, None], 0) / total
    tl.store(out + (row * HEADS + head) * HEAD_DIM + dim, result.to(out.dtype.element_ty))


@triton.jit
def _attend(
    query, best, total, result, kv, table, kv_head, start, end, sees, scale,
    MASKED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile over tokens `start` to `end`; if MASKED, query i sees the tokens before sees[i]."""
    dim = tl.arange(0, HEAD_DIM)
    token = start + tl.arange(0, KEYS)
    page = tl.load(table + token // PAGE, mask=token < end, other=0)
    for at in range(start, end, KEYS):
        token = at + tl.arange(0, KEYS)
        place = (page.to(tl.int64) * PAGE + token % PAGE) * (2 * KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
        place = place[:, None] + dim[None, :]
        if MASKED:
            key = tl.load(kv + place, mask=(token < end)[:, None], other=0.0)
            value = tl.load(kv + place + KV_HEADS * HEAD_DIM, mask=(token < end)[:, None], other=0.0)
        else:
            key = tl.load(kv + place)
            value = tl.load(kv + place + KV_HEADS * HEAD_DIM)
        page = tl.load(table + (token + KEYS) // PAGE, mask=token + KEYS < end, other=0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if MASKED:
            score = tl.where(token[None, :] < tl.minimum(sees, end)[:, None], score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        shrink = tl.exp2(best - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
        best = higher
    return best, total, result


@triton.jit(
    do_not_specialize=["first", "rows", "table_row"], do_not_specialize_on_alignment=["tables", "starts", "firsts"]
)
def _prefill(
    q, kv, tables, starts, firsts, out,
    q_row, table_row, first, rows, scale,
    RAGGED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of queries: all query heads of a key head for one token, then for the next. The longest tiles first."""
    tile, kv_head, sequence = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = 0
    if RAGGED:
        begin = tl.load(starts + sequence).to(tl.int32)
        rows = tl.load(starts + sequence + 1).to(tl.int32) - begin
        first = tl.load(firsts + sequence).to(tl.int32)
    if tile * QUERIES >= rows * GROUP:
        return
    number = tile * QUERIES + tl.arange(0, QUERIES)
    row = number // GROUP
    dim = tl.arange(0, HEAD_DIM)
    real = (row < rows)[:, None]
    place = (begin + row).to(tl.int64)
    head = kv_head * GROUP + number % GROUP
    query = tl.load(q + (place * q_row + head * HEAD_DIM)[:, None] + dim[None, :], mask=real, other=0.0)
    best = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    table = tables + sequence.to(tl.int64) * table_row
    sees = first + row + 1
    seen_by_all = (first + tile * QUERIES // GROUP + 1) // KEYS * KEYS
    end = first + tl.minimum(tl.cdiv((tile + 1) * QUERIES, GROUP), rows)
    best, total, result = _attend(
        query, best, total, result, kv, table, kv_head, 0, seen_by_all, sees, scale,
        False, KV_HEADS, HEAD_DIM, PAGE, KEYS,
    )  # fmt: skip
    best, total, result = _attend(
        query, best, total, result, kv, table, kv_head, seen_by_all, end, sees, scale,
        True, KV_HEADS, HEAD_DIM, PAGE, KEYS,
    )  # fmt: skip
    place = place * (KV_HEADS * GROUP * HEAD_DIM) + head * HEAD_DIM
    tl.store(out + place[:, None] + dim[None, :], (result / total[:, None]).to(out.dtype.element_ty), mask=real)
