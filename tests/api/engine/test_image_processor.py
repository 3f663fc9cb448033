"""Images are resized before the checkpoint's processor, with the very result that it has itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from api.engine.image_processor import CheckpointImageProcessor, as_floats

FOLDER = Path(__file__).resolve().parents[3] / "models" / "shapes"
SIZES = [(1920, 1440), (640, 480), (196, 140), (56, 56), (10, 10), (28, 2000), (3000, 20), (1, 150), (333, 777)]


@pytest.fixture(scope="module")
def processor() -> CheckpointImageProcessor:
    return CheckpointImageProcessor(AutoImageProcessor.from_pretrained(FOLDER, backend="pil"))


@pytest.mark.parametrize("size", SIZES)
def test_the_patches_are_those_of_the_checkpoints_processor(size: tuple[int, int], processor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype="uint8")
    image = Image.fromarray(pixels)
    expected = processor._processor(images=[image], return_tensors="np")

    made = processor.process(image)

    assert np.array_equal(as_floats(made.patches), expected["pixel_values"])
    assert made.grid == tuple(expected["image_grid_thw"][0])


def test_a_large_image_reaches_the_processor_in_its_final_size(processor) -> None:
    image = Image.new("RGB", (1920, 1440))

    resized, final = processor._resized(image)
    assert final and resized.size != image.size
    assert processor.process(image).grid[1:] == tuple(side // 14 for side in reversed(resized.size))


def test_an_image_takes_an_eighth_of_its_numbers_and_is_announced_so(processor) -> None:
    made = processor.process(Image.new("RGB", (640, 480)))

    assert made.patches.pixels.nbytes == as_floats(made.patches).nbytes // 8 == processor.count_bytes(640, 480)


def test_a_processor_with_numbers_of_its_own_is_used_as_it_is(monkeypatch) -> None:
    theirs = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    patchify = type(theirs).patchify

    def backwards(self, *given, **named):
        patches, *grid = patchify(self, *given, **named)
        return patches[::-1], *grid

    monkeypatch.setattr(type(theirs), "patchify", backwards)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (140, 196, 3), dtype="uint8"))

    made = CheckpointImageProcessor(theirs).process(image)

    assert np.array_equal(made.patches, theirs(images=[image], return_tensors="np")["pixel_values"])


def test_the_key_is_of_all_pixels(processor) -> None:
    image = Image.new("RGB", (196, 140))
    other = image.copy()
    other.putpixel((195, 139), (255, 0, 0))

    keys = {processor.process(item).key for item in (image, image.copy(), other)}

    assert len(keys) == 2 and all(len(key) == 16 for key in keys)
