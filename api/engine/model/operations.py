"""The interface of what a model computes, and its implementation in torch for every device and number format.

The loader chooses an implementation and hands it to the runner. `api.engine.kernels` has another one, compiled for the
CPU; a test compares the two. All are called by the engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from api.engine.model.attention import attend
from api.engine.model.forward_batch import AttentionMetadata, ForwardBatch
from api.engine.model.linear import Linear, TorchLinear
from api.engine.model.rotary import rotate
from api.engine.model.weights import DecoderLayer, VisionBlock

# (batch, KV cache of each layer) -> normed rows that logits are computed from [n, hidden]
FusedDecoder = Callable[[ForwardBatch, list[torch.Tensor]], torch.Tensor]
# (x [patches, hidden], cos, sin [patches, head_dim], frames) -> [patches, hidden]
FusedBlock = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class Operations(Protocol):
    needs_masks: bool  # whether AttentionMetadata must carry masks

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> Linear:
        """A matrix [out_features, in_features] in the form that these operations multiply."""

    def fuse_decoder(self, first_norm: torch.Tensor, layers: list[DecoderLayer], eps: float) -> FusedDecoder | None:
        """All layers in one call, or None if these operations compute them one by one."""

    def fuse_block(self, block: VisionBlock, heads: int, eps: float) -> FusedBlock | None:
        """A block of the vision encoder in one call, or None."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, delta_norm: torch.Tensor, next_norm: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x + rms_norm(delta) [rows, hidden] and its own norm: the end of one block, the start of
        the next."""

    def rotate_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        """Rotated qkv [rows, heads + 2 * kv_heads, head_dim], whose keys and values are then also in the rows
        `slot_mapping` of kv [tokens, 2 * kv_heads, head_dim]."""

    def attend_decode(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """One token of each of several requests: its rows of qkv -> [rows, heads * head_dim]."""

    def attend_prefill(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Several tokens of one request: its rows of qkv -> [rows, heads * head_dim]."""

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        """Patches that see all of their frame: qkv [patches, 3 * heads * head_dim], float32 cos and sin
        [patches, head_dim] -> [patches, heads * head_dim]."""


class TorchOperations:
    needs_masks = True

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> Linear:
        return TorchLinear(weight, bias, gated)

    def fuse_decoder(self, first_norm: torch.Tensor, layers: list[DecoderLayer], eps: float) -> FusedDecoder | None:
        return None

    def fuse_block(self, block: VisionBlock, heads: int, eps: float) -> FusedBlock | None:
        return None

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, delta_norm: torch.Tensor, next_norm: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + F.rms_norm(delta, delta_norm.shape, delta_norm, eps)
        return x, F.rms_norm(x, next_norm.shape, next_norm, eps)

    def rotate_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor:
        qkv = rotate(qkv, cos, sin)
        kv.index_copy_(0, slot_mapping, qkv[:, -kv.shape[1] :])
        return qkv

    def attend_decode(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Query heads that share a key head stand where tokens usually stand."""
        (rows, _, head_dim), kv_heads = qkv.shape, kv.shape[1] // 2
        q = qkv[:, : -2 * kv_heads].view(rows, kv_heads, -1, head_dim)
        stored = self._read(kv, metadata.pages.flatten()).view(rows, -1, 2 * kv_heads, head_dim)
        k, v = stored.transpose(1, 2).split(kv_heads, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=metadata.mask).reshape(rows, -1)

    def attend_prefill(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Query heads that share a key head form one batch."""
        (rows, _, head_dim), kv_heads = qkv.shape, kv.shape[1] // 2
        q = qkv[:, : -2 * kv_heads].view(rows, kv_heads, -1, head_dim)
        stored = qkv[:, -2 * kv_heads :] if metadata.mask is None else self._read(kv, metadata.pages)
        k, v = stored.transpose(0, 1).split(kv_heads)
        out = attend(q.permute(1, 2, 0, 3), k, v, metadata.mask, causal=metadata.mask is None)
        return out.permute(2, 0, 1, 3).reshape(rows, -1)

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        patches = len(qkv)
        q, k, v = qkv.view(patches, 3, heads, -1).unbind(1)
        q, k = _rotate_exact(q, cos[:, None], sin[:, None]), _rotate_exact(k, cos[:, None], sin[:, None])
        # Attention stays within a frame and a head.
        q, k, v = (t.view(frames, -1, *t.shape[1:]).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        attended = attend(q[:, None], k, v).view(frames, heads, -1, q.shape[-1])
        return attended.transpose(1, 2).reshape(patches, -1)

    def _read(self, kv: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Tokens of some pages, in order: [pages * page_tokens, 2 * kv_heads, head_dim]."""
        by_page = kv.view(-1, self._page_tokens * kv.shape[1] * kv.shape[2])
        return by_page.index_select(0, pages).view(-1, *kv.shape[1:])


def _rotate_exact(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [patches, heads, head_dim] in float32, as apply_rotary_pos_emb_vision of transformers' glm4v does."""
    exact = x.float()
    return torch.addcmul(exact * cos, exact.roll(exact.shape[-1] // 2, -1), sin).to(x.dtype)
