"""The text model of glm4v and glm46v over a paged KV cache, computed from the checkpoint's own weights.

The same arithmetic as the transformers modules (a test compares every token), arranged for serving:
rows of different requests at different positions in one pass, keys and values written in place,
query, key and value in one product, packed weights. Knows pages and positions, not requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from api.engine.model.linear import Linear, pack_all
from api.engine.model.operations import AttentionMetadata, Operations
from api.engine.model.rotary import Rotary, half_split_order


@dataclass(frozen=True)
class ForwardBatch:
    """Tensors of one forward pass over `rows` tokens."""

    inputs: torch.Tensor  # [rows, hidden]
    cos: torch.Tensor  # [rows, heads of q, k and v, head_dim]; values are turned by the angle zero
    sin: torch.Tensor
    places: torch.Tensor  # [rows]: where in the KV cache each row's key and value go
    groups: tuple[AttentionMetadata, ...]
    wanted: torch.Tensor | None  # rows whose logits are asked for; None: all


@dataclass(frozen=True)
class _Layer:
    qkv: Linear
    out: Linear
    after_attention: torch.Tensor
    before_mlp: torch.Tensor
    gate_up: Linear
    down: Linear
    after_mlp: torch.Tensor
    before_next: torch.Tensor  # of the next layer, or of the head

    def packed(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of run_layers in kernels.cpp; None where something does not fit the compiled products."""
        return (
            self.qkv.panels, self.qkv.bias, self.out.panels, self.after_attention, self.before_mlp,
            self.gate_up.panels, self.down.panels, self.after_mlp, self.before_next,
        )  # fmt: skip


class Decoder:
    def __init__(self, network: Any, positions: int, pages: int, page_tokens: int, operations: Operations) -> None:
        text, config = network.model.language_model, network.config.get_text_config()
        self.dtype, self.device = text.embed_tokens.weight.dtype, text.embed_tokens.weight.device
        self.hidden_size = config.hidden_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.page_tokens = page_tokens
        self._operations = operations
        self._packed: list[torch.Tensor | None] | None = None
        self._eps = config.rms_norm_eps
        rope = text.rotary_emb
        order = half_split_order(self.head_dim, 2 * len(rope.inv_freq))
        self.rotary = Rotary(
            rope.inv_freq, rope.mrope_section, self.head_dim, positions, self.dtype, rope.attention_scaling
        )
        self.embeddings: torch.Tensor = text.embed_tokens.weight.detach()
        norms = [*(layer.input_layernorm for layer in text.layers), text.norm]
        self._first_norm = norms[0].weight.detach()
        self._layers = [self._layer(*pair, order) for pair in zip(text.layers, norms[1:], strict=True)]
        self._head = Linear(network.lm_head.weight)
        # One row holds the keys, then the values of a token. Zeros, because hidden places are read and multiplied by 0.
        shape = (pages * page_tokens, 2 * self.kv_heads, self.head_dim)
        self.kv = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self._layers]

    @property
    def vocabulary_size(self) -> int:
        return self._head.out_features

    def use(self, operations: Operations) -> None:
        """From now on, also in the middle of a pass: all operations compute the same."""
        self._operations = operations

    def pack(self) -> None:
        """From now on all layers go through the compiled products, and so in one call."""
        pack_all(self.linears())
        weights = [tensor for layer in self._layers for tensor in layer.packed()]
        if all(tensor is not None for tensor in weights):
            self._packed = weights

    def linears(self) -> Iterator[Linear]:
        for layer in self._layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self._head

    @property
    def needs_masks(self) -> bool:
        return self._operations.needs_masks

    def run(self, step: ForwardBatch) -> torch.Tensor:
        """Store the keys and values of all rows; returns the wanted logits [rows, vocabulary] in float32."""
        normed = self._run_packed(step, self._packed) if self._packed else self._run_layers(step)
        if not len(normed):  # part of a prompt: nobody wants a token yet
            return torch.empty(0, self.vocabulary_size, device=self.device)
        return self._head(normed).float()

    def _run_packed(self, step: ForwardBatch, weights: list[torch.Tensor | None]) -> torch.Tensor:
        groups = step.groups
        return torch.ops.glm.run_layers(
            step.inputs, self._first_norm, weights, self.kv, step.cos, step.sin, step.places,
            [group.end for group in groups],
            [group.pages for group in groups],
            [step.places[:0] if group.lengths is None else group.lengths for group in groups],
            [group.first for group in groups],
            step.wanted, self._eps,
        )  # fmt: skip

    def _run_layers(self, step: ForwardBatch) -> torch.Tensor:
        do, x = self._operations, step.inputs
        normed = F.rms_norm(x, self._first_norm.shape, self._first_norm, self._eps)
        for layer, kv in zip(self._layers, self.kv, strict=True):
            attended = self._attend(normed, layer, kv, step)
            if step.wanted is not None and layer is self._layers[-1]:  # of all other rows the keys and values were needed
                if not len(step.wanted):
                    return x[:0]
                x, attended = x.index_select(0, step.wanted), attended.index_select(0, step.wanted)
            x, normed = do.add_norm(x, layer.out(attended), layer.after_attention, layer.before_mlp, self._eps)
            changed = layer.down(layer.gate_up(normed))
            x, normed = do.add_norm(x, changed, layer.after_mlp, layer.before_next, self._eps)
        return normed

    def spread_over_heads(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotations [rows, head_dim] for every head of q and k, and none for those of v."""
        turned = (len(cos), self.heads + self.kv_heads, self.head_dim)
        still = (len(cos), self.kv_heads, self.head_dim)
        return (
            torch.cat([cos[:, None].expand(turned), cos.new_ones(still)], dim=1),
            torch.cat([sin[:, None].expand(turned), sin.new_zeros(still)], dim=1),
        )

    def _attend(self, x: torch.Tensor, layer: _Layer, kv: torch.Tensor, step: ForwardBatch) -> torch.Tensor:
        do, qkv = self._operations, layer.qkv(x).view(len(x), -1, self.head_dim)
        qkv = do.rotate_store(qkv, step.cos, step.sin, kv, step.places)
        outs = [
            (do.attend_single if group.single else do.attend_chunk)(qkv[group.start : group.end], kv, group)
            for group in step.groups
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _layer(self, layer: Any, before_next: Any, order: list[int]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        weight = [self._reorder(q.weight, order), self._reorder(k.weight, order), v.weight]
        bias = [self._reorder(q.bias, order), self._reorder(k.bias, order), v.bias]
        return _Layer(
            qkv=Linear(torch.cat(weight), torch.cat(bias)),
            out=Linear(attention.o_proj.weight),
            after_attention=layer.post_self_attn_layernorm.weight.detach(),
            before_mlp=layer.post_attention_layernorm.weight.detach(),
            gate_up=Linear(mlp.gate_up_proj.weight, gated=True),
            down=Linear(mlp.down_proj.weight),
            after_mlp=layer.post_mlp_layernorm.weight.detach(),
            before_next=before_next.weight.detach(),
        )

    def _reorder(self, rows: torch.Tensor, order: list[int]) -> torch.Tensor:
        """Permute the dimensions of every head in the output rows of a projection."""
        return rows.unflatten(0, (-1, self.head_dim))[:, order].flatten(0, 1)
