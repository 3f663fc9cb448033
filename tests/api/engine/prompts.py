"""Requests, images and steps around a runner, for tests that compare with transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from typing import Any

import torch
from PIL import Image, ImageDraw

from api.engine.encoder_cache import EncoderCache
from api.engine.image_processor import as_floats
from api.engine.kv_cache import KvCache
from api.engine.loaded_model import Model
from api.engine.request import Request, SamplingParams
from api.engine.scheduler import Scheduler
from api.engine.sequence import Sequence, make_sequence

STEPS = 12


def draw_image(seed: int, size: tuple[int, int]) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((5, 5, size[0] // 2, size[1] // 2), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def request_for(
    model: Model, messages: list[dict[str, Any]], images: Items[Image.Image], name: str = "r", **sampling
) -> Request:
    rendered = model.template.render(messages, None, True)
    inputs = tuple(model.image_processor.process(image) for image in images)
    image_id = model.vocabulary.special["<|image|>"]
    remaining = iter(inputs)
    ids = [i for t in model.vocabulary.encode(rendered) for i in ([t] if t != image_id else [t] * next(remaining).tokens)]
    return Request(name, tuple(ids), SamplingParams(**{"max_tokens": STEPS, **sampling}), inputs)


def ask(text: str, images: int = 0) -> dict[str, Any]:
    content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


class Steps:
    """The engine's steps without its thread."""

    def __init__(self, model: Model, chunk_tokens: int = 512, pages: int | None = None) -> None:
        self.model, self.chunk_tokens = model, chunk_tokens
        size = model.capacity
        self.scheduler = Scheduler(
            99, size.slots, KvCache(pages or size.pages, size.page_tokens), EncoderCache(size.encoder_cache_bytes), model.runner.packing
        )
        self.image_id = model.vocabulary.special[model.image_token]

    def add(self, request: Request) -> Sequence:
        sequence = make_sequence(request, lambda event: None, self.image_id)
        self.scheduler.add(sequence)
        return sequence

    def step(self, slice_s: float = 10.0) -> None:
        runner = self.model.runner
        for sequence in self.scheduler.admit():
            runner.copy_pages([sequence.block_table.copy] if sequence.block_table.copy else [])
            runner.begin(sequence)
        task = self.scheduler.next_encode_task()
        if task and (features := runner.encode(task, slice_s)) is not None:
            self.scheduler.encode_done(task, features, [runner.size_bytes(each) for each in features])
        batch = self.scheduler.batch(self.chunk_tokens)
        if batch.sequences:
            tokens = runner.compute(batch)
            self.scheduler.computed(batch)
            for sequence, sampled in zip(batch.sampled, tokens, strict=True):
                sequence.append(sampled.token)
                if len(sequence.output_ids) == sequence.request.sampling.max_tokens:
                    self.scheduler.remove(sequence)
        self.scheduler.check()

    def run(self, *requests: Request, slice_s: float = 10.0) -> list[list[int]]:
        sequences = [self.add(request) for request in requests]
        while self.scheduler.has_work:
            self.step(slice_s)
        return [sequence.output_ids for sequence in sequences]


def generate(reference, model: Model, request: Request, **options) -> list[int]:
    """The tokens that transformers generates."""
    count = request.sampling.max_tokens
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None, **options}
    inputs = _inputs(model, request)
    return reference.generate(**inputs, **options)[0, len(request.prompt_ids) :].tolist()


def next_logits(reference, model: Model, request: Request) -> torch.Tensor:
    """The logits [vocabulary] of transformers after the prompt."""
    with torch.inference_mode():
        return reference(**_inputs(model, request)).logits[0, -1].float()


def _inputs(model: Model, request: Request) -> dict[str, torch.Tensor]:
    ids = torch.tensor([request.prompt_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if request.images:
        inputs["pixel_values"] = torch.cat([torch.as_tensor(as_floats(p.patches)) for p in request.images])
        inputs["image_grid_thw"] = torch.tensor([p.grid for p in request.images])
        inputs["mm_token_type_ids"] = (ids == model.vocabulary.special["<|image|>"]).int()
    return inputs
