"""The operations of a model in bfloat16, computed by the compiled library, which must have been loaded.

Implements api.engine.model.operations.Operations. The C++ side checks shapes, types and contiguity of its tensors and
the bounds of page numbers and slots, and raises RuntimeError if they do not fit. Engine thread only.
"""

from __future__ import annotations

import torch

from api.engine.kernels.build import has_fast_products
from api.engine.model.linear import Linear, Role, TorchLinear
from api.engine.model.operations import (
    AttentionMetadata,
    DecoderLayer,
    ForwardBatch,
    Frames,
    FusedBlock,
    FusedDecoder,
    VisionBlock,
    each_frame,
)
from api.engine.model.recipe import BF16

# A panel of products.h: output features, and input features that one instruction multiplies.
PANEL, PAIR = 32, 2


class PackedLinear:
    """A matrix in panels of products.h. Raises RuntimeError if there is not enough memory."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.panels = torch.ops.glm.pack(weight.detach().contiguous(), gated)
        self.bias = None if bias is None else bias.detach().contiguous()
        self._gated = gated

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._gated:
            return torch.ops.glm.gated_product(x, self.panels)
        return torch.ops.glm.product(x, self.panels, self.bias)


class CompiledOperations:
    needs_masks = False
    ragged = False
    recipe = BF16

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False, role: Role = "text"
    ) -> Linear:
        """Packed in panels where that is faster and the matrix is divisible into them, else for oneDNN."""
        features, inputs = weight.shape
        if gated and bias is not None:  # gated_product has no bias
            return TorchLinear(weight, bias, gated)
        if not has_fast_products() or features % PANEL or inputs % PAIR:
            return TorchLinear(weight, bias, gated)
        return PackedLinear(weight, bias, gated)

    def fuse_decoder(self, first_norm: torch.Tensor, layers: list[DecoderLayer], eps: float) -> FusedDecoder | None:
        """All layers in one call, which releases the GIL for the threads that serve HTTP."""
        weights = [tensor for layer in layers for tensor in _decoder_weights(layer)]
        if any(tensor is None for tensor in weights):
            return None

        def run(batch: ForwardBatch, kv: list[torch.Tensor]) -> torch.Tensor:
            none = batch.slot_mapping[:0]
            return torch.ops.glm.run_layers(
                batch.inputs, first_norm, weights, kv, batch.cos, batch.sin, batch.slot_mapping,
                [part.end for part in batch.attention],
                [part.pages for part in batch.attention],
                [none if part.lengths is None else part.lengths for part in batch.attention],
                [part.first for part in batch.attention],
                batch.logits_indices, eps,
            )  # fmt: skip

        return run

    def fuse_block(self, block: VisionBlock, heads: int, eps: float) -> FusedBlock | None:
        qkv, out, gate_up, down = (_panels(linear) for linear in (block.qkv, block.out, block.gate_up, block.down))
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        if block.q_norm is not None or _bias(block.out) is not None or _bias(block.down) is not None:
            return None  # run_block knows neither
        bias = _bias(block.qkv)

        def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int) -> torch.Tensor:
            return torch.ops.glm.run_block(
                x, block.norm1, qkv, bias, out, block.norm2, gate_up, down, cos, sin, frames, heads, eps
            )

        return run

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        delta_norm: torch.Tensor,
        next_norm: torch.Tensor,
        eps: float,
        following: Linear | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.glm.add_norm(x, delta, delta_norm, next_norm, eps)

    def rotate_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert positions is None, "cos and sin are spread over the heads here"
        torch.ops.glm.rotate_store(qkv, cos, sin, kv, slot_mapping)
        return qkv

    def attend_decode(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        return torch.ops.glm.attend_decode(qkv, kv, metadata.pages, metadata.lengths)

    def attend_prefill(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        return torch.ops.glm.attend_prefill(qkv, kv, metadata.pages, metadata.first)

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        return torch.ops.glm.attend_image(qkv, cos, sin, frames, heads)

    def attend_images(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: Frames, heads: int
    ) -> torch.Tensor:
        return each_frame(self.attend_image, qkv, cos, sin, frames, heads)


def _decoder_weights(layer: DecoderLayer) -> tuple[torch.Tensor | None, ...]:
    """In the order of run_layers in kernels.cpp; None for a matrix that is not in panels."""
    return (
        _panels(layer.qkv), _bias(layer.qkv), _panels(layer.out), layer.post_attention_norm, layer.pre_mlp_norm,
        _panels(layer.gate_up), _panels(layer.down), layer.post_mlp_norm, layer.next_norm,
    )  # fmt: skip


def _panels(linear: Linear) -> torch.Tensor | None:
    return linear.panels if isinstance(linear, PackedLinear) else None


def _bias(linear: Linear) -> torch.Tensor | None:
    return linear.bias if isinstance(linear, PackedLinear) else None
