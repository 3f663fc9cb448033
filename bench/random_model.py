"""A model of the exact shape of GLM-4.6V-Flash with random weights, made on the device in seconds.

Speed and memory do not depend on what the weights are, so they can be measured on a machine that has no checkpoint. The
demo's tokenizer, chat template and image processor are used: their formats are those of the real model. Only plain words
of its vocabulary are sampled, because all other rows of the head are zero, so every answer has the length asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.glm4v import Glm4vConfig

from api.engine.image_processor import CheckpointImageProcessor
from api.engine.loaded_model import Capacity, CheckpointTemplate, Model, Runner
from api.engine.request import ImageInput
from api.engine.text.tokenizer import Vocabulary
from bench.checkpoint import words
from bench.random_source import RandomSource
from models.shapes.checkpoint import FOLDER as SHAPES


def flash_config() -> Any:
    """The shape of GLM-4.6V-Flash: the defaults of transformers, with the rotary settings of the published model."""
    config = Glm4vConfig()
    text = config.text_config
    text.rope_parameters = {**text.rope_parameters, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    return config


def small_config() -> Any:
    """The same in small, for a dry run on a CPU."""
    config = flash_config()
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = 256, 2, 512
    text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 4, 2, 2048
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
    vision.hidden_size, vision.depth, vision.num_heads, vision.intermediate_size = 128, 2, 2, 256
    vision.out_hidden_size = text.hidden_size
    config.image_token_id = 14  # that of the demo's tokenizer
    return config


class WordSource(RandomSource):
    """Random weights of a model that only ever samples plain words of the demo's vocabulary."""

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        tensor = super().take(name, on_host)
        if name == "lm_head.weight":
            rows = torch.tensor(sorted(words().values()), device=tensor.device)
            kept = tensor[rows]
            tensor.zero_()[rows] = kept
        return tensor


def random_model(runner: Runner, capacity: Capacity, context_tokens: int) -> Model:
    """What the engine needs besides the runner, from the demo's folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHAPES)
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    processor = transformers.AutoImageProcessor.from_pretrained(SHAPES, backend="pil")
    return Model(
        id="random-flash",
        runner=runner,
        vocabulary=vocabulary,
        template=CheckpointTemplate(tokenizer),
        image_processor=CheckpointImageProcessor(processor),
        end_ids=frozenset(),
        context_tokens=context_tokens,
        capacity=capacity,
    )


def image_of(grid: tuple[int, int, int], patch_size: int, seed: int) -> ImageInput:
    """Random patches of an image of grid (frames, rows, columns), as the image processor would give them."""
    frames, rows, columns = grid
    patches = np.random.default_rng(seed).standard_normal((frames * rows * columns, patch_size), dtype=np.float32)
    return ImageInput(patches=patches, grid=grid, tokens=frames * rows * columns // 4, key=b"%016d" % seed)
