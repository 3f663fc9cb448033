"""The runner against transformers' own generate: same tokens, whatever ran before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from api.engine.loader import load
from api.engine.model import Model
from api.engine.request import Request, Sampling, Sequence
from settings import ROOT, Settings

STEPS = 12


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load(Settings(model=str(tiny_checkpoint), threads=1, device="cpu"), lambda fraction: None)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path):
    from transformers import Glm4vForConditionalGeneration

    return Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((5, 5, size[0] // 2, size[1] // 2), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def request_for(model: Model, text: str, images: list[Image.Image], **sampling) -> Request:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    rendered = model.template.render([{"role": "user", "content": content}], None, True)
    pictures = tuple(model.pictures.process(image) for image in images)
    image_id = model.vocabulary.special["<|image|>"]
    spans = iter(pictures)
    ids = [i for t in model.vocabulary.encode(rendered) for i in ([t] if t != image_id else [t] * next(spans).tokens)]
    return Request("r", tuple(ids), Sampling(max_tokens=STEPS, **sampling), pictures)


def begin(model: Model, request: Request) -> Sequence:
    sequence = Sequence(request, deliver=lambda event: None)
    for place in range(len(request.pictures)):
        model.runner.encode_picture(sequence)
        sequence.pictures_encoded = place + 1
    sequence.output_ids.append(model.runner.prefill(sequence))
    return sequence


def run(model: Model, request: Request) -> list[int]:
    sequence = begin(model, request)
    while len(sequence.output_ids) < STEPS:
        sequence.output_ids += model.runner.decode([sequence])
    return sequence.output_ids


def generate(reference, model: Model, request: Request, **options) -> list[int]:
    ids = torch.tensor([request.prompt_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if request.pictures:
        inputs["pixel_values"] = torch.cat([torch.as_tensor(p.patches) for p in request.pictures])
        inputs["image_grid_thw"] = torch.tensor([p.grid for p in request.pictures])
        inputs["mm_token_type_ids"] = (ids == model.vocabulary.special["<|image|>"]).int()
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "eos_token_id": None, **options}
    return reference.generate(**inputs, **options)[0, ids.shape[1] :].tolist()


PROMPTS = {
    "text": ("Hello, what is this?", []),
    "one picture": ("What is in the picture?", [picture(1, (150, 90))]),
    "two pictures": ("The red circle?", [picture(2, (90, 200)), picture(3, (128, 128))]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_equal_those_of_generate(name: str, model: Model, reference) -> None:
    request = request_for(model, *PROMPTS[name])

    ours = run(model, request)

    assert ours == generate(reference, model, request)
    assert len(set(ours)) > 1  # a model that repeats one token would prove nothing


def test_greedy_tokens_equal_those_of_generate_with_a_repetition_penalty(model: Model, reference) -> None:
    request = request_for(model, *PROMPTS["one picture"], repetition_penalty=1.7)

    ours = run(model, request)

    assert ours == generate(reference, model, request, repetition_penalty=1.7)


def test_interleaved_requests_do_not_disturb_each_other(model: Model, reference) -> None:
    requests = [request_for(model, *prompt) for prompt in PROMPTS.values()]

    sequences = [begin(model, request) for request in requests]
    while len(sequences[0].output_ids) < STEPS:
        for sequence, token in zip(sequences, model.runner.decode(sequences), strict=True):
            sequence.output_ids.append(token)

    assert [s.output_ids for s in sequences] == [generate(reference, model, r) for r in requests]


def test_the_picture_changes_the_answer(model: Model) -> None:
    answers = [run(model, request_for(model, "What is it?", [picture(seed, (112, 112))])) for seed in (4, 5, 6)]

    assert len({tuple(answer) for answer in answers}) > 1


def test_the_demo_checkpoint_answers_as_generate_does() -> None:
    folder = ROOT / "models" / "shapes"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the demo checkpoint is not built yet")
    from transformers import Glm4vForConditionalGeneration

    from models.shapes.pictures import draw_shapes

    demo = load(Settings(model=str(folder), threads=1, device="cpu"), lambda fraction: None)
    reference = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    drawn = draw_shapes([("red", "circle"), ("blue", "square")], size=(320, 240), seed=1)
    request = request_for(demo, "How many shapes are there?", [drawn])

    ours = run(demo, request)

    assert ours == generate(reference, demo, request)
