"""What the kernels depend on, of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from api.engine.model.rotary import head_dim_of


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int  # of an MLP
    image_heads: int
    image_head_dim: int
    page_tokens: int


def shape_of(config: Any, page_tokens: int) -> Shape:
    """Of a config of transformers."""
    text, vision = config.get_text_config(), config.vision_config
    return Shape(
        text.num_attention_heads, text.num_key_value_heads, head_dim_of(text), text.hidden_size, text.intermediate_size,
        vision.num_heads, vision.hidden_size // vision.num_heads, page_tokens,
    )  # fmt: skip
