"""The interface of what a model computes, and its implementation in torch for every device and number format.

The loader chooses an implementation and hands it to the runner. `api.engine.kernels` has another one, compiled for the
CPU; a test compares the two. All are called by the engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from api.engine.model.linear import Linear, Role, has_onednn
from api.engine.model.recipe import BF16, Recipe
from api.engine.model.rotary import rotate

# Attention scores held at once; more queries are computed in blocks, so that a large image does not need gigabytes.
MAX_SCORES = 2**23


@dataclass(frozen=True)
class AttentionMetadata:
    """Rows `start` to `end` of a forward batch and the pages that they attend to.

    Decode, one new token of each of several sequences: `pages` [rows, pages] are their block tables, `lengths` [rows] the
    tokens that a row attends to. Prefill, consecutive tokens of one sequence: `pages` [pages], after `first` earlier
    tokens. `mask` [rows, ...] is added to the scores by operations that need it. It is None for the first chunk of a
    sequence, where causal attention is enough; elsewhere None has it made on the device from the lengths.

    Operations that say so compute chunks of several sequences in one call: `pages` [sequences, pages], the first row of
    each chunk and the number of rows in `starts`, earlier tokens in `firsts`, and at most `max_rows` rows of a sequence.
    """

    start: int
    end: int
    pages: torch.Tensor  # int64 page numbers (on CUDA int32 too) of the KV cache
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    first: int = 0
    starts: torch.Tensor | None = None  # int32 [sequences + 1], on the device
    firsts: torch.Tensor | None = None  # int32 [sequences], on the device
    max_rows: int | None = None

    @property
    def decode(self) -> bool:
        """Whether the rows are single new tokens of several sequences."""
        return self.lengths is not None


@dataclass(frozen=True)
class ForwardBatch:
    """Tensors of one forward pass over `rows` tokens."""

    inputs: torch.Tensor  # [rows, hidden]: embeddings of tokens and images
    # [rows, heads + 2 * kv_heads, head_dim], values are rotated by the angle zero; on CUDA [rows, head_dim]
    cos: torch.Tensor
    sin: torch.Tensor
    slot_mapping: torch.Tensor  # [rows] int64: row of the KV cache that each token's key and value are written to
    attention: tuple[AttentionMetadata, ...]
    logits_indices: torch.Tensor | None  # [n] int64: rows whose logits are computed; None: all
    # [rows]: where cos and sin of each row are in `cos` and `sin`, which then are tables [positions, head_dim]
    positions: torch.Tensor | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of a layer of the text model. Norm weights are [hidden]."""

    qkv: Linear
    out: Linear
    post_attention_norm: torch.Tensor
    pre_mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    post_mlp_norm: torch.Tensor
    next_norm: torch.Tensor  # the input norm of the next layer, or the norm before the head


@dataclass(frozen=True)
class VisionBlock:
    """The weights of a block of the vision encoder. Norm weights are [hidden]; those of queries and keys, which GLM-OCR
    has, [head_dim]."""

    norm1: torch.Tensor
    qkv: Linear
    out: Linear
    norm2: torch.Tensor
    gate_up: Linear
    down: Linear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class Frames:
    """Frames of images that are encoded together, in the order of their patches."""

    patches: tuple[int, ...]  # of each frame
    starts: torch.Tensor | None = None  # int32 [frames + 1] on the device, for kernels: first patch of each, then the number of patches

    @property
    def alike(self) -> bool:
        """Whether all have the same size."""
        return len(set(self.patches)) == 1


# (batch, KV cache of each layer) -> normed rows that logits are computed from [n, hidden]; None: not for such a batch
FusedDecoder = Callable[[ForwardBatch, list[torch.Tensor]], torch.Tensor | None]
# (x [patches, hidden], cos, sin [patches, head_dim], frames) -> [patches, hidden]
FusedBlock = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class Operations(Protocol):
    needs_masks: bool  # whether AttentionMetadata must carry masks
    ragged: bool  # whether `attend_prefill` computes chunks of several sequences in one call
    recipe: Recipe  # how `linear` keeps weights

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False, role: Role = "text"
    ) -> Linear:
        """Prepare a matrix [out_features, in_features] and a bias [out_features] for these operations."""

    def fuse_decoder(self, first_norm: torch.Tensor, layers: list[DecoderLayer], eps: float) -> FusedDecoder | None:
        """All layers in one call, or None if these operations have no such call for these weights."""

    def fuse_block(self, block: VisionBlock, heads: int, eps: float) -> FusedBlock | None:
        """A block of the vision encoder in one call, or None."""

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        delta_norm: torch.Tensor,
        next_norm: torch.Tensor,
        eps: float,
        following: Linear | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """y = x + rms_norm(delta, delta_norm) and rms_norm(y, next_norm); x, delta and both results [rows, hidden].

        With `following` the second result is for this product alone, and may have a form that only this takes."""

    def rotate_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotate the queries and keys of qkv [rows, heads + 2 * kv_heads, head_dim] and write keys and values to the rows
        `slot_mapping` of kv [tokens, 2 * kv_heads, head_dim]. Returns the rotated qkv; the argument may be overwritten."""

    def attend_decode(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Decode rows of qkv [rows, heads + 2 * kv_heads, head_dim] -> [rows, heads * head_dim]."""

    def attend_prefill(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Prefill rows of qkv [rows, heads + 2 * kv_heads, head_dim] -> [rows, heads * head_dim]."""

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        """Attention of patches within their frame: qkv [patches, 3 * heads * head_dim] not yet rotated, float32 cos and
        sin [patches, head_dim] -> [patches, heads * head_dim]."""

    def attend_images(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: Frames, heads: int
    ) -> torch.Tensor:
        """The same for frames of several sizes. The result of one does not depend on the others."""


class TorchOperations:
    needs_masks = True
    ragged = False

    def __init__(self, page_tokens: int, recipe: Recipe = BF16) -> None:
        self._page_tokens = page_tokens
        self.recipe = recipe

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False, role: Role = "text"
    ) -> Linear:
        return self.recipe.linear(role, weight, bias, gated)

    def fuse_decoder(self, first_norm: torch.Tensor, layers: list[DecoderLayer], eps: float) -> FusedDecoder | None:
        return None

    def fuse_block(self, block: VisionBlock, heads: int, eps: float) -> FusedBlock | None:
        return None

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        delta_norm: torch.Tensor,
        next_norm: torch.Tensor,
        eps: float,
        following: Linear | None = None,
    ) -> tuple[torch.Tensor, Any]:
        x = x + F.rms_norm(delta, delta_norm.shape, delta_norm, eps)
        return x, F.rms_norm(x, next_norm.shape, next_norm, eps)

    def rotate_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if positions is not None:
            cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
        if cos.ndim == 2:
            rotated = qkv.shape[1] - kv.shape[1] // 2
            keys = rotate(qkv[:, :rotated], cos[:, None], sin[:, None])
            qkv = torch.cat([keys, qkv[:, rotated:]], dim=1)
        else:
            qkv = rotate(qkv, cos, sin)
        kv.index_copy_(0, slot_mapping, qkv[:, -kv.shape[1] :])
        return qkv

    def attend_decode(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Query heads that share a key head take the dimension of the tokens."""
        (rows, _, head_dim), kv_heads = qkv.shape, kv.shape[1] // 2
        q = qkv[:, : -2 * kv_heads].view(rows, kv_heads, -1, head_dim)
        stored = self._read(kv, metadata.pages.flatten()).view(rows, -1, 2 * kv_heads, head_dim)
        k, v = stored.transpose(1, 2).split(kv_heads, dim=1)
        mask = metadata.mask
        if mask is None:
            assert metadata.lengths is not None
            token = torch.arange(k.shape[2], device=q.device)
            mask = _additive(token >= metadata.lengths[:, None], q.dtype)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(rows, -1)

    def attend_prefill(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Query heads that share a key head form one batch."""
        (rows, _, head_dim), kv_heads = qkv.shape, kv.shape[1] // 2
        q = qkv[:, : -2 * kv_heads].view(rows, kv_heads, -1, head_dim)
        mask = metadata.mask
        if mask is None and metadata.first:
            token = torch.arange(metadata.pages.numel() * self._page_tokens, device=q.device)
            seen = torch.arange(metadata.first, metadata.first + rows, device=q.device)
            mask = _additive(token > seen[:, None], q.dtype)
        stored = qkv[:, -2 * kv_heads :] if mask is None else self._read(kv, metadata.pages)
        k, v = stored.transpose(0, 1).split(kv_heads)
        out = attend(q.permute(1, 2, 0, 3), k, v, mask, causal=mask is None)
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

    def attend_images(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: Frames, heads: int
    ) -> torch.Tensor:
        return each_frame(partial(TorchOperations.attend_image, self), qkv, cos, sin, frames, heads)

    def _read(self, kv: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Gather the rows of pages, in order: [pages * page_tokens, 2 * kv_heads, head_dim]."""
        by_page = kv.view(-1, self._page_tokens * kv.shape[1] * kv.shape[2])
        return by_page.index_select(0, pages).view(-1, *kv.shape[1:])


def each_frame(
    attend_image: Callable[..., torch.Tensor],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    frames: Frames,
    heads: int,
) -> torch.Tensor:
    """`attend_images` by one call for each frame."""
    parts = (part.split(frames.patches) for part in (qkv, cos, sin))
    return torch.cat([attend_image(*frame, 1, heads) for frame in zip(*parts, strict=True)])


def _additive(masked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)


def _rotate_exact(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [patches, heads, head_dim] in float32, as apply_rotary_pos_emb_vision of transformers' glm4v does."""
    exact = x.float()
    return torch.addcmul(exact * cos, exact.roll(exact.shape[-1] // 2, -1), sin).to(x.dtype)


def has_fast_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend` runs on oneDNN's bfloat16 products."""
    return dtype == torch.bfloat16 and has_onednn(device.type, dtype)


def attend(
    q: torch.Tensor,  # [kv_heads, shared, rows, head_dim]: `shared` query heads for each key head
    k: torch.Tensor,  # [kv_heads, keys, head_dim]
    v: torch.Tensor,  # [kv_heads, keys, head_dim]
    mask: torch.Tensor | None = None,  # [rows, keys], added to the scores
    causal: bool = False,  # without a mask: row i attends to keys 0 to i
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v: [kv_heads, shared, rows, head_dim].

    Torch's fused kernel is the right one on GPUs and in float32. In bfloat16 on a CPU it does not use the processor's
    bfloat16 instructions, and two batched products with a softmax between them, as in `eager_attention_forward` of
    transformers' glm4v, take less than half its time (torch 2.13; docs/performance.md).
    """
    if has_fast_products(q.device, q.dtype):
        return _attend_by_products(q, k, v, mask, causal)
    k, v = (t[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _attend_by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    kv_heads, shared, rows, head_dim = q.shape
    q, keys = q * head_dim**-0.5, k.transpose(1, 2)
    block = max(MAX_SCORES // (kv_heads * shared * k.shape[1]), 1)
    outs = []
    for start in range(0, rows, block):
        part = q[:, :, start : start + block]
        visible = min(start + block, rows) if causal else k.shape[1]
        scores = torch.bmm(part.reshape(kv_heads, -1, head_dim), keys[:, :, :visible]).view(*part.shape[:3], visible)
        if causal:
            scores += _causal_mask(part.shape[2], visible, scores)
        elif mask is not None:
            scores += mask[start : start + block]
        probabilities = torch.softmax(scores, dim=-1).view(kv_heads, -1, visible)
        outs.append(torch.bmm(probabilities, v[:, :visible]).view(part.shape))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _causal_mask(rows: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """Mask [rows, keys] of the last `rows` of `keys` tokens."""
    return torch.full((rows, keys), -torch.inf, dtype=like.dtype, device=like.device).triu(keys - rows + 1)
