"""Attention of many queries over the keys and values of one request or one image.

Torch's fused kernel is the right one on GPUs and in float32. In bfloat16 on a CPU its inner products do not use the
processor's bfloat16 instructions, and two batched products with a softmax between them take less than half its time
(torch 2.13; docs/performance.md). `eager_attention_forward` in transformers' glm4v does the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from api.engine.model.linear import has_onednn

# Scores held at once; more queries are computed in blocks, so that a large image does not need gigabytes.
MAX_SCORES = 2**23


def has_fast_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether batched products run on oneDNN's bfloat16 kernels."""
    return dtype == torch.bfloat16 and has_onednn(device.type, dtype)


def attend(
    q: torch.Tensor,  # [kv_heads, shared, rows, head_dim]: the query heads that share a key head
    k: torch.Tensor,  # [kv_heads, keys, head_dim]
    v: torch.Tensor,  # [kv_heads, keys, head_dim]
    mask: torch.Tensor | None = None,  # [rows, keys], added to the scores
    causal: bool = False,  # without a mask: row i sees keys 0 to i
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v: [kv_heads, shared, rows, head_dim]."""
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
        seen = min(start + block, rows) if causal else k.shape[1]
        scores = torch.bmm(part.reshape(kv_heads, -1, head_dim), keys[:, :, :seen]).view(*part.shape[:3], seen)
        if causal:
            scores += _hide_later(part.shape[2], seen, scores)
        elif mask is not None:
            scores += mask[start : start + block]
        probabilities = torch.softmax(scores, dim=-1).view(kv_heads, -1, seen)
        outs.append(torch.bmm(probabilities, v[:, :seen]).view(part.shape))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _hide_later(rows: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """Causal mask [rows, keys] for the last `rows` of `keys` tokens."""
    return torch.full((rows, keys), -torch.inf, dtype=like.dtype, device=like.device).triu(keys - rows + 1)
