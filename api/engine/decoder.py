"""The text model of glm4v and glm46v over a paged KV cache, computed from the checkpoint's own weights.

The same arithmetic as the transformers modules (a test compares every token), arranged for serving:
rows of different requests at different positions in one pass, keys and values written in place,
query, key and value in one product, packed weights. Knows pages and positions, not requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from api.engine.attention import attend
from api.engine.linear import Linear
from api.engine.rotary import Rotary, half_split_order, rotate


@dataclass(frozen=True)
class Group:
    """Rows `start` to `end` of a pass that attend alike.

    Either one new token for each of several requests (`pages` [rows, pages], `mask` hides what is
    beyond a request's length), or several tokens of one request (`pages` [pages], `mask` hides what
    comes later; None when the rows begin the request, so that plain causal attention does).
    """

    start: int
    end: int
    pages: torch.Tensor | None
    mask: torch.Tensor | None
    single: bool


@dataclass(frozen=True)
class Pass:
    """Tensors of one forward pass over `rows` tokens."""

    inputs: torch.Tensor  # [rows, hidden]
    cos: torch.Tensor  # [rows, heads of q, k and v, head_dim]; values are turned by the angle zero
    sin: torch.Tensor
    places: torch.Tensor  # [rows]: where in the KV cache each row's key and value go
    groups: tuple[Group, ...]
    wanted: torch.Tensor | None  # rows whose logits are asked for; None: all


@dataclass(frozen=True)
class _Layer:
    before_attention: torch.Tensor
    qkv: Linear
    out: Linear
    after_attention: torch.Tensor
    before_mlp: torch.Tensor
    gate_up: Linear
    down: Linear
    after_mlp: torch.Tensor


class Decoder:
    def __init__(self, network: Any, positions: int, pages: int, page_tokens: int) -> None:
        text, config = network.model.language_model, network.config.get_text_config()
        self.dtype, self.device = text.embed_tokens.weight.dtype, text.embed_tokens.weight.device
        self.hidden_size = config.hidden_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.page_tokens = page_tokens
        self._eps = config.rms_norm_eps
        rope = text.rotary_emb
        order = half_split_order(self.head_dim, 2 * len(rope.inv_freq))
        self.rotary = Rotary(
            rope.inv_freq, rope.mrope_section, self.head_dim, positions, self.dtype, rope.attention_scaling
        )
        self.embeddings: torch.Tensor = text.embed_tokens.weight.detach()
        self._layers = [self._layer(layer, order) for layer in text.layers]
        self._norm = text.norm.weight.detach()
        self._head = Linear(network.lm_head.weight)
        # One row holds the keys, then the values of a token. Zeros, because hidden places are read and multiplied by 0.
        shape = (pages * page_tokens, 2 * self.kv_heads, self.head_dim)
        self.kv = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self._layers]

    @property
    def vocabulary_size(self) -> int:
        return self._head.out_features

    def run(self, step: Pass) -> torch.Tensor:
        """Store the keys and values of all rows; returns the wanted logits [rows, vocabulary] in float32."""
        x = step.inputs
        for layer, kv in zip(self._layers, self.kv, strict=True):
            attended = layer.out(self._attend(self._rms(x, layer.before_attention), layer, kv, step))
            x = x + self._rms(attended, layer.after_attention)
            gate, up = layer.gate_up(self._rms(x, layer.before_mlp)).chunk(2, dim=-1)
            x = x + self._rms(layer.down(F.silu(gate).mul_(up)), layer.after_mlp)
        if step.wanted is not None:
            x = x.index_select(0, step.wanted)
        if not len(x):  # part of a prompt: nobody wants a token yet
            return torch.empty(0, self.vocabulary_size, device=self.device)
        return self._head(self._rms(x, self._norm)).float()

    def spread_over_heads(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotations [rows, head_dim] for every head of q and k, and none for those of v."""
        turned = (len(cos), self.heads + self.kv_heads, self.head_dim)
        still = (len(cos), self.kv_heads, self.head_dim)
        return (
            torch.cat([cos[:, None].expand(turned), cos.new_ones(still)], dim=1),
            torch.cat([sin[:, None].expand(turned), sin.new_zeros(still)], dim=1),
        )

    def _attend(self, x: torch.Tensor, layer: _Layer, kv: torch.Tensor, step: Pass) -> torch.Tensor:
        heads = self.heads + 2 * self.kv_heads
        qkv = rotate(layer.qkv(x).view(-1, heads, self.head_dim), step.cos, step.sin)
        kv.index_copy_(0, step.places, qkv[:, self.heads :])
        outs = [
            self._attend_single(qkv, kv, group) if group.single else self._attend_chunk(qkv, kv, group)
            for group in step.groups
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: Group) -> torch.Tensor:
        """One token of each request: its query heads that share a key head stand where tokens usually stand."""
        assert group.pages is not None
        rows = group.end - group.start
        q = qkv[group.start : group.end, : self.heads].view(rows, self.kv_heads, -1, self.head_dim)
        stored = self._read(kv, group.pages.flatten()).view(rows, -1, 2 * self.kv_heads, self.head_dim)
        k, v = stored.transpose(1, 2).split(self.kv_heads, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask).reshape(rows, -1)

    def _attend_chunk(self, qkv: torch.Tensor, kv: torch.Tensor, group: Group) -> torch.Tensor:
        """Several tokens of one request: query heads that share a key head form one batch."""
        rows, shared = group.end - group.start, self.heads // self.kv_heads
        q = qkv[group.start : group.end, : self.heads].view(rows, self.kv_heads, shared, self.head_dim)
        stored = qkv[group.start : group.end, self.heads :] if group.pages is None else self._read(kv, group.pages)
        k, v = stored.transpose(0, 1).split(self.kv_heads)
        out = attend(q.permute(1, 2, 0, 3), k, v, group.mask, causal=group.mask is None)
        return out.permute(2, 0, 1, 3).reshape(rows, -1)

    def _read(self, kv: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Tokens of some pages, in order: [pages * page_tokens, 2 * kv_heads, head_dim]."""
        in_pages = kv.view(-1, self.page_tokens * 2 * self.kv_heads * self.head_dim)
        return in_pages.index_select(0, pages).view(-1, 2 * self.kv_heads, self.head_dim)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._eps)

    def _layer(self, layer: Any, order: list[int]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        weight = [self._reorder(q.weight, order), self._reorder(k.weight, order), v.weight]
        bias = [self._reorder(q.bias, order), self._reorder(k.bias, order), v.bias]
        return _Layer(
            before_attention=layer.input_layernorm.weight.detach(),
            qkv=Linear(torch.cat(weight), torch.cat(bias)),
            out=Linear(attention.o_proj.weight),
            after_attention=layer.post_self_attn_layernorm.weight.detach(),
            before_mlp=layer.post_attention_layernorm.weight.detach(),
            gate_up=Linear(mlp.gate_up_proj.weight),
            down=Linear(mlp.down_proj.weight),
            after_mlp=layer.post_mlp_layernorm.weight.detach(),
        )

    def _reorder(self, rows: torch.Tensor, order: list[int]) -> torch.Tensor:
        """Permute the dimensions of every head in the output rows of a projection."""
        return rows.unflatten(0, (-1, self.head_dim))[:, order].flatten(0, 1)
