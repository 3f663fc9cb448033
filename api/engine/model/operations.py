"""What a model computes besides matrix products, in torch: on every device and in every number format.

`api/engine/kernels/build.py` has the same operations compiled for the CPU; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from api.engine.model.attention import attend
from api.engine.model.rotary import rotate


@dataclass(frozen=True)
class AttentionMetadata:
    """Rows `start` to `end` of a pass that attend alike.

    Either each row for itself, as one new token for each of several requests (`pages` [rows, pages] and `lengths`
    [rows], the tokens that a row sees), or several tokens of one request (`pages` [pages], and `first` tokens before
    them). `mask` hides from torch's operations what a row must not see; None for rows that begin their request, where
    plain causal attention does.
    """

    start: int
    end: int
    pages: torch.Tensor
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    first: int = 0

    @property
    def single(self) -> bool:
        return self.lengths is not None


class Operations(Protocol):
    needs_masks: bool

    def add_norm(
        self, x: torch.Tensor, part: torch.Tensor, after: torch.Tensor, before: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + norm(part) [rows, hidden], and the norm of that: the end of one block and the start of the next."""

    def rotate_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Turned qkv [rows, heads + 2 * kv_heads, head_dim]; its keys and values are now at `places` of `kv`."""

    def attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: AttentionMetadata) -> torch.Tensor:
        """One token of each request in a group: its rows of qkv -> [rows, heads * head_dim]."""

    def attend_chunk(self, qkv: torch.Tensor, kv: torch.Tensor, group: AttentionMetadata) -> torch.Tensor:
        """Several tokens of one request: its rows of qkv -> [rows, heads * head_dim]."""

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        """Patches that see all of their frame: qkv [patches, 3 * heads * head_dim] and float32 rotations
        [patches, head_dim] -> [patches, heads * head_dim]."""


class TorchOperations:
    needs_masks = True

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens

    def add_norm(
        self, x: torch.Tensor, part: torch.Tensor, after: torch.Tensor, before: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + F.rms_norm(part, after.shape, after, eps)
        return x, F.rms_norm(x, before.shape, before, eps)

    def rotate_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        qkv = rotate(qkv, cos, sin)
        kv.index_copy_(0, places, qkv[:, -kv.shape[1] :])
        return qkv

    def attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: AttentionMetadata) -> torch.Tensor:
        """Query heads that share a key head stand where tokens usually stand."""
        (rows, _, head_dim), kv_heads = qkv.shape, kv.shape[1] // 2
        q = qkv[:, : -2 * kv_heads].view(rows, kv_heads, -1, head_dim)
        stored = self._read(kv, group.pages.flatten()).view(rows, -1, 2 * kv_heads, head_dim)
        k, v = stored.transpose(1, 2).split(kv_heads, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask).reshape(rows, -1)

    def attend_chunk(self, qkv: torch.Tensor, kv: torch.Tensor, group: AttentionMetadata) -> torch.Tensor:
        """Query heads that share a key head form one batch."""
        (rows, _, head_dim), kv_heads = qkv.shape, kv.shape[1] // 2
        q = qkv[:, : -2 * kv_heads].view(rows, kv_heads, -1, head_dim)
        stored = qkv[:, -2 * kv_heads :] if group.mask is None else self._read(kv, group.pages)
        k, v = stored.transpose(0, 1).split(kv_heads)
        out = attend(q.permute(1, 2, 0, 3), k, v, group.mask, causal=group.mask is None)
        return out.permute(2, 0, 1, 3).reshape(rows, -1)

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        patches = len(qkv)
        q, k, v = qkv.view(patches, 3, heads, -1).unbind(1)
        q, k = _turn(q, cos[:, None], sin[:, None]), _turn(k, cos[:, None], sin[:, None])
        # Attention stays within a frame and a head.
        q, k, v = (t.view(frames, -1, *t.shape[1:]).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        attended = attend(q[:, None], k, v).view(frames, heads, -1, q.shape[-1])
        return attended.transpose(1, 2).reshape(patches, -1)

    def _read(self, kv: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Tokens of some pages, in order: [pages * page_tokens, 2 * kv_heads, head_dim]."""
        by_page = kv.view(-1, self._page_tokens * kv.shape[1] * kv.shape[2])
        return by_page.index_select(0, pages).view(-1, *kv.shape[1:])


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [patches, heads, head_dim]; in float32, as the module does."""
    exact = x.float()
    return torch.addcmul(exact * cos, exact.roll(exact.shape[-1] // 2, -1), sin).to(x.dtype)
