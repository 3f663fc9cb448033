"""The families of models that the engine computes, by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from api.engine.model.rotary import DEFAULT_SECTIONS, head_dim_of


@dataclass(frozen=True)
class Family:
    """What must be known of a family. The rest is read from its config (width of heads, rotary sections) or from which
    tensors it has (biases, learned positions, norms of queries and keys)."""

    class_name: str  # in transformers
    drafts: bool = False  # has a layer after the last one, which drafts tokens and which answering does not need


FAMILIES: Mapping[str, Family] = {
    "glm4v": Family("Glm4vForConditionalGeneration"),  # GLM-4.1V-9B-Thinking, AutoGLM-Phone-9B
    "glm46v": Family("Glm46VForConditionalGeneration"),  # GLM-4.6V-Flash
    "glmga": Family("Glm46VForConditionalGeneration"),  # GLM-GA
    "glm_ocr": Family("GlmOcrForConditionalGeneration", drafts=True),  # GLM-OCR
}


def is_draft(config: Any, name: str) -> bool:
    """Whether a tensor belongs to the layer that drafts tokens."""
    layers = config.get_text_config().num_hidden_layers
    return FAMILIES[config.model_type].drafts and name.startswith(f"model.language_model.layers.{layers}.")


def check_config(config: Any) -> Iterator[str]:
    """What a config asks for that the engine does not compute, one sentence for each. Shapes are not among it: the
    weights are compared with them."""
    text, vision = config.get_text_config(), config.vision_config
    for name, part in (("text_config", text), ("vision_config", vision)):
        if part.hidden_act != "silu":
            yield f"{name}.hidden_act must be silu. Given: {part.hidden_act}"
    rope = text.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        yield f"text_config.rope_parameters.rope_type must be default. Given: {kind}"
    rotated = int(head_dim_of(text) * rope.get("partial_rotary_factor", 1.0))
    sections = list(rope.get("mrope_section", DEFAULT_SECTIONS))
    if rotated % 2 or sum(sections) * 2 != rotated:
        yield (
            f"text_config.rope_parameters: the sum of mrope_section must be half of the {rotated} rotated dimensions of a "
            f"head. Given: {sections}"
        )
    if (kind := (vision.rope_parameters or {}).get("rope_type", "axial")) not in ("axial", "default"):
        yield f"vision_config.rope_parameters.rope_type must be axial. Given: {kind}"
    if text.num_attention_heads % text.num_key_value_heads:
        yield (
            f"text_config.num_attention_heads must be a multiple of num_key_value_heads ({text.num_key_value_heads}). "
            f"Given: {text.num_attention_heads}"
        )
    if vision.hidden_size % vision.num_heads or vision.hidden_size // vision.num_heads % 4:
        yield (
            f"vision_config.hidden_size must be num_heads ({vision.num_heads}) times a multiple of 4. "
            f"Given: {vision.hidden_size}"
        )
    for name in ("patch_size", "temporal_patch_size", "image_size"):
        if not isinstance(getattr(vision, name), int):
            yield f"vision_config.{name} must be one number. Given: {getattr(vision, name)}"
    if getattr(config, "quantization_config", None):
        yield "quantization_config: quantised checkpoints are not loaded; take the original one and set GLM_WEIGHTS"


def check_processor(config: Any, processor: Any) -> Iterator[str]:
    """Where an image processor makes other patches than the vision encoder takes."""
    vision = config.vision_config
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
    for theirs, ours in names.items():
        given, expected = getattr(processor, theirs), getattr(vision, ours)
        if given != expected:
            yield f"preprocessor_config.json: {theirs} must be {expected}, the {ours} of config.json. Given: {given}"
    if (factor := getattr(processor, "patch_expand_factor", 1) or 1) != 1:
        yield f"preprocessor_config.json: patch_expand_factor must be 1. Given: {factor}"


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a model with this config, as transformers makes it; a head that shares the
    embeddings is not among them. Takes no memory for the weights."""
    with torch.device("meta"):
        network = getattr(transformers, FAMILIES[config.model_type].class_name)(config)
    return {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
