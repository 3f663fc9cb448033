"""A model of the exact shape of GLM-4.6V-Flash with random weights, made on the device in seconds.

Speed and memory do not depend on what the weights are, so they can be measured on a machine that has no checkpoint. The
demo's tokenizer, chat template and image processor are used: their formats are those of the real model. Only plain words
of its vocabulary are sampled, because all other rows of the head are zero, so every answer has the length asked for.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.glm4v import Glm4vConfig

from api.engine.loaded_model import Capacity, CheckpointImageProcessor, CheckpointTemplate, Model, Runner
from api.engine.model.rotary import inverse_frequencies
from api.engine.request import ImageInput
from api.engine.text.tokenizer import Vocabulary
from bench.checkpoint import words
from models.shapes.checkpoint import FOLDER as SHAPES

WEIGHT_STD = 0.02


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


class RandomSource:
    """The `WeightSource` of such a model. A tensor depends on `seed` and its name alone."""

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, seed: int = 46) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._seed = seed
        self._shapes = shapes(config)

    def take(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(self._seed + zlib.crc32(name.encode()))
        tensor.normal_(0, WEIGHT_STD, generator=generator)
        if name == "lm_head.weight":
            rows = torch.tensor(sorted(words().values()), device=self.device)
            kept = tensor[rows]
            tensor.zero_()[rows] = kept
        return tensor

    def find(self, name: str) -> torch.Tensor | None:
        return self.take(name) if name in self._shapes else None


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all weights, from a network without memory."""
    from transformers.models.glm4v import Glm4vForConditionalGeneration

    inverse_frequencies(config.get_text_config(), 128)  # raises ValueError for a rope that is not supported
    with torch.device("meta"):
        network = Glm4vForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in network.named_parameters(remove_duplicate=False)}



def random_model(source: RandomSource, runner: Runner, capacity: Capacity, context_tokens: int) -> Model:
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
