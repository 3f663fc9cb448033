"""The largest picture: what a checkpoint's image processor makes at most, and how to make it less.

A picture that is larger is scaled down, as the processor does with every picture that exceeds its own limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.engine.loading.families import shapes_of
from api.engine.loading.memory_plan import ModelShape, shape_of


def largest_picture(image_processor: Any) -> int:
    """Image tokens of the largest picture."""
    return image_processor.size["longest_edge"] // _pixels_of_token(image_processor)


def limit_pictures(image_processor: Any, tokens: int) -> int:
    """Lower the limit to `tokens`, 0 leaves it; returns what it is then. A smallest picture is never larger."""
    if 0 < tokens < largest_picture(image_processor):
        size = {edge: image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")}
        longest = tokens * _pixels_of_token(image_processor)
        kept = {"shortest_edge": min(size["shortest_edge"], longest), "longest_edge": longest}
        image_processor.size = type(image_processor.size)(**kept)
    return largest_picture(image_processor)


def shape_with_pictures(config: Any, weights: Mapping[str, tuple[int, ...]], image_processor: Any) -> ModelShape:
    return shape_of(config, weights, largest_picture(image_processor))


def flash_shape() -> ModelShape:
    """GLM-4.6V-Flash where its checkpoint is not there: what transformers describes by default."""
    from transformers import Glm4vConfig

    config = Glm4vConfig()
    return shape_of(config, shapes_of(config))


def _pixels_of_token(image_processor: Any) -> int:
    """The processor counts the pixels of all frames, and a still picture as `temporal_patch_size` of them."""
    side = image_processor.patch_size * image_processor.merge_size
    return image_processor.temporal_patch_size * side**2
