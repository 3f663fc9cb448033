"""Penalties of tokens that a text has already, in Triton.

    penalise(logits, seen, counts, slots, repetition, presence, frequency): in place

May be captured in a CUDA graph. A row without penalties costs no traffic: its programs end at once, so that the same graph
serves rows with and without them. The arithmetic is that of `penalise_seen` and `penalise_counts` of `api.engine.model.sampler`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


def penalise(
    logits: torch.Tensor,  # float32 [rows, vocabulary], contiguous
    seen: torch.Tensor,  # bool [slots, vocabulary], contiguous: in prompt or output
    counts: torch.Tensor,  # int16 [slots, vocabulary], contiguous: in the output
    slots: torch.Tensor,  # int32 [rows]
    repetition: torch.Tensor,  # float32 [rows], as are the others; 1: off
    presence: torch.Tensor,  # 0: off
    frequency: torch.Tensor,
) -> None:
    rows, size = logits.shape
    _penalise[(rows, triton.cdiv(size, BLOCK))](
        logits, seen.view(torch.uint8), counts, slots, repetition, presence, frequency, size, BLOCK=BLOCK, num_warps=8
    )


@triton.jit
def _penalise(logits, seen, counts, slots, repetition, presence, frequency, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    by_repetition, by_presence, by_frequency = tl.load(repetition + row), tl.load(presence + row), tl.load(frequency + row)
    if (by_repetition == 1.0) & (by_presence == 0.0) & (by_frequency == 0.0):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < size
    known = tl.load(slots + row).to(tl.int64) * size + column
    x = tl.load(logits + row * size + column, mask=real, other=0.0)
    in_text = tl.load(seen + known, mask=real, other=0) != 0
    times = tl.load(counts + known, mask=real, other=0).to(tl.float32)
    x = tl.where(in_text, tl.where(x < 0, x * by_repetition, x / by_repetition), x)
    x = x - by_frequency * times - tl.where(times > 0, by_presence, 0.0)
    tl.store(logits + row * size + column, x, mask=real)
