"""What a decoder layer does between its matrix products, in torch: on every device and in every number format.

`api/engine/kernels.py` has the same operations compiled for the CPU; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from api.engine.rotary import rotate


@dataclass(frozen=True)
class Group:
    """Rows `start` to `end` of a pass that attend alike.

    Either each row for itself, as one new token for each of several requests (`pages` [rows, pages] and `lengths`
    [rows], the tokens that a row sees; torch's operations need `mask` to hide the rest), or several tokens of one
    request (`pages` [pages], `mask` hides what comes later; None when the rows begin the request, so that plain
    causal attention does).
    """

    start: int
    end: int
    pages: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    @property
    def single(self) -> bool:
        return self.lengths is not None


class Operations(Protocol):
    def add_norm(
        self, x: torch.Tensor, part: torch.Tensor, after: torch.Tensor, before: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + norm(part) [rows, hidden], and the norm of that: the end of one block and the start of the next."""

    def rotate_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Turned qkv [rows, heads + 2 * kv_heads, head_dim]; its keys and values are now at `places` of `kv`."""

    def attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: Group) -> torch.Tensor:
        """One token of each request in a group: its rows of qkv -> [rows, heads * head_dim]."""

    def prefers_single(self, rows: int, tokens: int) -> bool:
        """Whether so many rows of one request, that see up to so many tokens, are attended sooner one by one."""


class TorchOperations:
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

    def attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: Group) -> torch.Tensor:
        """Query heads that share a key head stand where tokens usually stand."""
        assert group.pages is not None
        (rows, _, head_dim), kv_heads = qkv.shape, kv.shape[1] // 2
        q = qkv[:, : -2 * kv_heads].view(rows, kv_heads, -1, head_dim)
        stored = read_pages(kv, group.pages.flatten(), self._page_tokens).view(rows, -1, 2 * kv_heads, head_dim)
        k, v = stored.transpose(1, 2).split(kv_heads, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask).reshape(rows, -1)

    def prefers_single(self, rows: int, tokens: int) -> bool:
        return False


def read_pages(kv: torch.Tensor, pages: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """Tokens of some pages, in order: [pages * page_tokens, 2 * kv_heads, head_dim]."""
    return kv.view(-1, page_tokens * kv.shape[1] * kv.shape[2]).index_select(0, pages).view(-1, *kv.shape[1:])
