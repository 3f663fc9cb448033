"""The operations of a model in bfloat16, computed by the compiled library, which must have been loaded.

Implements api.engine.model.operations.Operations. The C++ side checks shapes, types and contiguity of its tensors and
the bounds of page numbers and slots, and raises RuntimeError if they do not fit. Engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from api.engine.kernels.build import PAGE_TOKENS
from api.engine.kernels.choice import ALL_ROWS, Choice, default_choice
from api.engine.model.linear import Linear, Role, TorchLinear
from api.engine.model.operations import (
    AttentionMetadata,
    DecoderLayer,
    ForwardBatch,
    Frames,
    FusedBlock,
    FusedDecoder,
    TorchOperations,
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


class DividedLinear:
    """In panels for up to `limit` rows, by oneDNN for more: both are faster where they are used, for twice the memory."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool, limit: int) -> None:
        self.out_features, self.in_features = weight.shape
        self.few, self.many = PackedLinear(weight, bias, gated), TorchLinear(weight, bias, gated)
        self.limit = limit

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.many if len(x) > self.limit else self.few)(x)


class CompiledOperations:
    needs_masks = False
    ragged = False
    recipe = BF16

    def __init__(self, choice: Choice | None = None) -> None:
        self._choice = choice or default_choice()
        self._torch = TorchOperations(PAGE_TOKENS)

    @property
    def signature(self) -> str:
        """What distinguishes these operations' numbers from those of another choice."""
        return self._choice.signature

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False, role: Role = "text"
    ) -> Linear:
        """In panels, for oneDNN or both as chosen; for oneDNN what is not divisible into panels."""
        features, inputs = weight.shape
        limit = self._choice.limit((features, inputs, gated))
        if gated and bias is not None:  # gated_product has no bias
            return TorchLinear(weight, bias, gated)
        if not limit or features % PANEL or inputs % PAIR:
            return TorchLinear(weight, bias, gated)
        return PackedLinear(weight, bias, gated) if limit == ALL_ROWS else DividedLinear(weight, bias, gated, limit)

    def fuse_decoder(self, first_norm: torch.Tensor, layers: list[DecoderLayer], eps: float) -> FusedDecoder | None:
        """All layers in one call, which releases the GIL for the threads that serve HTTP. Batches with prompts are not for
        it where torch computes their attention."""
        if "decode" in self._choice.by_torch or not layers:
            return None
        matrices = [_matrix(each) for layer in layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        found = [matrix for matrix in matrices if matrix is not None]
        if len(found) < len(matrices):
            return None
        if any(matrix.bias is not None for number, matrix in enumerate(found) if number % 4):
            return None  # run_layers knows the bias of the first only
        weights = []
        for number, layer in enumerate(layers):
            qkv, out, gate_up, down = found[4 * number : 4 * number + 4]
            bias = first_norm[:0] if qkv.bias is None else qkv.bias
            weights += [
                qkv.panels, bias, out.panels, layer.post_attention_norm, layer.pre_mlp_norm,
                gate_up.panels, down.panels, layer.post_mlp_norm, layer.next_norm,
            ]  # fmt: skip
        onednn, limits = [matrix.onednn for matrix in found], [matrix.limit for matrix in found]
        prompts_too = "prefill" not in self._choice.by_torch

        def run(batch: ForwardBatch, kv: list[torch.Tensor]) -> torch.Tensor | None:
            if not prompts_too and any(not part.decode for part in batch.attention):
                return None
            none = batch.slot_mapping[:0]
            return torch.ops.glm.run_layers(
                batch.inputs, first_norm, weights, onednn, limits, kv, batch.cos, batch.sin, batch.slot_mapping,
                [part.end for part in batch.attention],
                [part.pages for part in batch.attention],
                [none if part.lengths is None else part.lengths for part in batch.attention],
                [part.first for part in batch.attention],
                batch.logits_indices, eps,
            )  # fmt: skip

        return run

    def fuse_block(self, block: VisionBlock, heads: int, eps: float) -> FusedBlock | None:
        """A block in two calls around its attention."""
        qkv, out, gate_up, down = (_matrix(each) for each in (block.qkv, block.out, block.gate_up, block.down))
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        if block.q_norm is not None or any(matrix.bias is not None for matrix in (out, gate_up, down)):
            return None  # end_block knows neither
        rest = (out, gate_up, down)
        panels, onednn = [matrix.panels for matrix in rest], [matrix.onednn for matrix in rest]
        limits = [matrix.limit for matrix in rest]

        def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int) -> torch.Tensor:
            projected = torch.ops.glm.begin_block(x, block.norm1, qkv.panels, qkv.onednn, qkv.limit, qkv.bias, eps)
            attended = self.attend_image(projected, cos, sin, frames, heads)
            return torch.ops.glm.end_block(x, attended, block.norm2, panels, onednn, limits, eps)

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
        if "decode" in self._choice.by_torch:
            return self._torch.attend_decode(qkv, kv, metadata)
        return torch.ops.glm.attend_decode(qkv, kv, metadata.pages, metadata.lengths)

    def attend_prefill(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        if "prefill" in self._choice.by_torch:
            return self._torch.attend_prefill(qkv, kv, metadata)
        return torch.ops.glm.attend_prefill(qkv, kv, metadata.pages, metadata.first)

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        if "picture" in self._choice.by_torch:
            return self._torch.attend_image(qkv, cos, sin, frames, heads)
        return torch.ops.glm.attend_image(qkv, cos, sin, frames, heads)

    def attend_images(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: Frames, heads: int
    ) -> torch.Tensor:
        return each_frame(self.attend_image, qkv, cos, sin, frames, heads)


@dataclass(frozen=True)
class _Matrix:
    """A matrix as kernels.cpp takes it: `panels` for up to `limit` rows, `onednn` for more; empty where never used."""

    panels: torch.Tensor
    onednn: torch.Tensor
    limit: int
    bias: torch.Tensor | None


def _matrix(linear: Linear) -> _Matrix | None:
    """None for a matrix that kernels.cpp cannot multiply."""
    if isinstance(linear, PackedLinear):
        return _Matrix(linear.panels, linear.panels[:0], ALL_ROWS, linear.bias)
    if isinstance(linear, DividedLinear):
        few, many, limit = linear.few.panels, linear.many, linear.limit
    elif isinstance(linear, TorchLinear):
        few, many, limit = torch.empty(0, dtype=torch.bfloat16), linear, 0
    else:
        return None
    return _Matrix(few, many.weight, limit, many.bias) if many.weight.is_mkldnn else None
