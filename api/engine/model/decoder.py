"""The text model of the families that the engine computes, over a paged KV cache, with the checkpoint's own weights.

The arithmetic of Glm4vTextModel (transformers 5.23, models.glm4v.modeling_glm4v; a test compares every token), arranged
for serving: rows of different sequences at different positions in one pass, keys and values written in place, one
product for query, key and value. Knows pages and positions, not requests. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from api.engine.model.host_memory import device_view
from api.engine.model.linear import Linear
from api.engine.model.operations import DecoderLayer, ForwardBatch, Operations
from api.engine.model.rotary import DEFAULT_SECTIONS, Rotary, half_split_order, head_dim_of, inverse_frequencies
from api.engine.model.weight_source import WeightSource

# Called with the number of a layer, its result [rows, hidden] and the same normed for what follows; it may change both.
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]


TEXT = "model.language_model"


class Decoder:
    """`positions` is the largest M-RoPE position plus one, `pages` of `page_tokens` tokens each the size of the KV cache.
    `kv` is that of an earlier decoder of the same model, to be used again.
    """

    def __init__(
        self,
        source: WeightSource,
        positions: int,
        pages: int,
        page_tokens: int,
        operations: Operations,
        kv: list[torch.Tensor] | None = None,
    ) -> None:
        config = source.config.get_text_config()
        self.dtype, self.device = source.dtype, source.device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim_of(config)
        self._operations = operations
        self._eps = config.rms_norm_eps
        frequencies = inverse_frequencies(config, self.head_dim).to(self.device)
        sections = config.rope_parameters.get("mrope_section", DEFAULT_SECTIONS)
        self.rotary = Rotary(frequencies, sections, self.head_dim, positions, self.dtype)
        order = half_split_order(self.head_dim, 2 * len(frequencies))
        self.embeddings = self._embeddings(source)  # [vocabulary, hidden]
        # The largest matrix comes first, when there is most room for its copy in full precision.
        self._head = operations.linear(source.take("lm_head.weight"), role="head")
        self._first_norm = source.take(f"{TEXT}.layers.0.input_layernorm.weight")
        layers = range(config.num_hidden_layers)
        self._layers = [self._layer(source, number, number == layers[-1], order) for number in layers]
        self.kv = self.new_kv(pages * page_tokens) if kv is None else kv
        self._fused = operations.fuse_decoder(self._first_norm, self._layers, self._eps)

    @property
    def vocabulary_size(self) -> int:
        return self._head.out_features

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def needs_masks(self) -> bool:
        return self._operations.needs_masks

    def linears(self) -> Iterator[Linear]:
        for layer in self._layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self._head

    def new_kv(self, tokens: int) -> list[torch.Tensor]:
        """Room for the keys and values of `tokens` tokens: a tensor for each layer."""
        # A row holds the keys, then the values of a token. Zeros, because masked rows are read and multiplied by 0.
        shape = (tokens, 2 * self.kv_heads, self.head_dim)
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self._layers]

    def run(
        self, batch: ForwardBatch, observe: Observer | None = None, kv: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Write the keys and values of all rows; returns float32 logits [len(logits_indices), vocabulary]. With `kv` they
        are written there and not to the KV cache."""
        normed = self.hidden(batch, observe, kv)
        if not len(normed):  # chunks that do not end their prompts: no token is sampled
            return torch.empty(0, self.vocabulary_size, device=self.device)
        return self.head(normed).float()

    def hidden(
        self, batch: ForwardBatch, observe: Observer | None = None, kv: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The same up to the head: normed rows [len(logits_indices), hidden]."""
        kv = self.kv if kv is None else kv
        if self._fused and observe is None and (normed := self._fused(batch, kv)) is not None:
            return normed
        return self._run_layers(batch, kv, observe)

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of normed rows, in the number format of the model."""
        return self._head(normed)

    def spread_over_heads(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [rows, head_dim] -> [rows, heads of q, k and v, head_dim], with no rotation for those of v."""
        rotated = (len(cos), self.heads + self.kv_heads, self.head_dim)
        values = (len(cos), self.kv_heads, self.head_dim)
        return (
            torch.cat([cos[:, None].expand(rotated), cos.new_ones(values)], dim=1),
            torch.cat([sin[:, None].expand(rotated), sin.new_zeros(values)], dim=1),
        )

    def _run_layers(
        self, batch: ForwardBatch, all_kv: list[torch.Tensor], observe: Observer | None = None
    ) -> torch.Tensor:
        ops, x, indices = self._operations, batch.inputs, batch.logits_indices
        normed = F.rms_norm(x, self._first_norm.shape, self._first_norm, self._eps)
        for number, (layer, kv) in enumerate(zip(self._layers, all_kv, strict=True)):
            attended = self._attend(normed, layer, kv, batch)
            if indices is not None and layer is self._layers[-1]:  # of the other rows only keys and values are needed
                if not len(indices):
                    return x[:0]
                x, attended = x.index_select(0, indices), attended.index_select(0, indices)
            delta, norms = layer.out(attended), (layer.post_attention_norm, layer.pre_mlp_norm)
            x, normed = ops.add_norm(x, delta, *norms, self._eps, following=layer.gate_up)
            delta = layer.down(layer.gate_up(normed))
            observed = observe is not None or layer is self._layers[-1]
            following = None if observed else self._layers[number + 1].qkv
            x, normed = ops.add_norm(x, delta, layer.post_mlp_norm, layer.next_norm, self._eps, following=following)
            if observe is not None:
                observe(number, x, normed)
        return normed

    def _attend(self, x: Any, layer: DecoderLayer, kv: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        ops, qkv = self._operations, layer.qkv(x).unflatten(-1, (-1, self.head_dim))
        if batch.positions is None:
            qkv = ops.rotate_store(qkv, batch.cos, batch.sin, kv, batch.slot_mapping)
        else:
            qkv = ops.rotate_store(qkv, batch.cos, batch.sin, kv, batch.slot_mapping, batch.positions)
        outs = [
            (ops.attend_decode if part.decode else ops.attend_prefill)(qkv[part.start : part.end], kv, part)
            for part in batch.attention
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _embeddings(self, source: WeightSource) -> torch.Tensor:
        name = f"{TEXT}.embed_tokens.weight"
        if self.device.type == "cuda" and self._operations.recipe.host_embeddings:
            return device_view(source.take(name, on_host=True), self.device)
        return source.take(name)

    def _layer(self, source: WeightSource, number: int, last: bool, order: list[int]) -> DecoderLayer:
        linear, name = self._operations.linear, f"{TEXT}.layers.{number}"
        after = f"{TEXT}.norm.weight" if last else f"{TEXT}.layers.{number + 1}.input_layernorm.weight"
        return DecoderLayer(
            qkv=linear(*self._qkv(source, f"{name}.self_attn", order)),
            out=linear(source.take(f"{name}.self_attn.o_proj.weight")),
            post_attention_norm=source.take(f"{name}.post_self_attn_layernorm.weight"),
            pre_mlp_norm=source.take(f"{name}.post_attention_layernorm.weight"),
            gate_up=linear(source.take(f"{name}.mlp.gate_up_proj.weight"), gated=True),
            down=linear(source.take(f"{name}.mlp.down_proj.weight")),
            post_mlp_norm=source.take(f"{name}.post_mlp_layernorm.weight"),
            next_norm=source.take(after),
        )

    def _qkv(self, source: WeightSource, name: str, order: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of one product for query, key and value."""
        q, k, v = (source.take(f"{name}.{part}_proj.weight") for part in "qkv")
        weight = torch.cat([self._reorder(q, order), self._reorder(k, order), v])
        if source.find(f"{name}.q_proj.bias") is None:
            return weight, None
        q, k, v = (source.take(f"{name}.{part}_proj.bias") for part in "qkv")
        return weight, torch.cat([self._reorder(q, order), self._reorder(k, order), v])

    def _reorder(self, rows: torch.Tensor, order: list[int]) -> torch.Tensor:
        """Permute the dimensions of every head in the output rows of a projection."""
        return rows.unflatten(0, (-1, self.head_dim))[:, order].flatten(0, 1)
