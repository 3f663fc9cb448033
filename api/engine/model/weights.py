"""The weights of one layer, as operations get them to compute a whole layer in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from api.engine.model.linear import Linear


@dataclass(frozen=True)
class DecoderLayer:
    """A layer of the text model. Norm weights are [hidden]."""

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
    """A block of the vision encoder. Norm weights are [hidden]."""

    norm1: torch.Tensor
    qkv: Linear
    out: Linear
    norm2: torch.Tensor
    gate_up: Linear
    down: Linear
