"""Images as the vision encoder takes them: made by the image processor of a checkpoint, kept as bytes.

A patch of numbers says no more than the byte of each pixel: every byte stands for one float32 of its colour, and both
frames of a patch are the same picture. Bytes take an eighth of the memory. Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from api.engine.request import ImageInput

TRIAL_SIDE = 4  # of the picture on which bytes are compared with the checkpoint's processor, in squares that are merged


@dataclass(frozen=True, eq=False)
class PixelPatches:
    """The patches of an image as bytes, and what each byte means."""

    pixels: Any  # uint8 [patches, colours, patch_size ** 2], an array here, a tensor on its way to a device
    scale: Any  # float32 [colours, 256]: the number for each byte of a colour
    frames: int  # in a patch: temporal_patch_size, all of them equal

    @property
    def nbytes(self) -> int:
        return int(self.pixels.nbytes + self.scale.nbytes)

    def __len__(self) -> int:
        return len(self.pixels)


def as_floats(patches: Any) -> np.ndarray:
    """Patches of either form as float32 [patches, colours * frames * patch_size ** 2], for other implementations."""
    if not isinstance(patches, PixelPatches):
        return np.asarray(patches)
    colours = np.arange(len(patches.scale))[:, None]
    floats = patches.scale[colours, patches.pixels][:, :, None]
    return np.broadcast_to(floats, (*floats.shape[:2], patches.frames, floats.shape[3])).reshape(len(patches), -1)


class CheckpointImageProcessor:
    """The image processor of a checkpoint: Glm4vImageProcessor or Glm46VImageProcessor of `transformers`, PIL backend.

    It is asked what each byte means and what size an image gets, and its patches are made here as bytes. Where that gives
    other numbers than its own for a picture without pattern, or it would resize an image twice, its own are used.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._scale: np.ndarray | None = None
        settings = processor.to_json_string() if hasattr(processor, "to_json_string") else repr(vars(processor))
        self.settings_key = hashlib.sha256(settings.encode()).digest()
        try:
            self._scale = self._numbers_of_bytes()
            if not self._agrees():
                self._scale = None
        except (AttributeError, TypeError, ValueError):  # another kind of processor
            self._scale = None

    def count_tokens(self, width: int, height: int) -> int:
        return self._processor.get_number_of_image_patches(height, width) // self._processor.merge_size**2

    def count_bytes(self, width: int, height: int) -> int:
        """Bytes that an image of this size takes until it is encoded."""
        processor = self._processor
        values = processor.get_number_of_image_patches(height, width) * 3 * processor.patch_size**2
        return values if self._scale is not None else values * processor.temporal_patch_size * 4

    def process(self, image: Image.Image) -> ImageInput:
        """`image`: upright."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        resized, final = self._resized(image)
        patches: PixelPatches | np.ndarray
        if final and self._scale is not None:
            grid, patches = self._as_bytes(resized)
        else:
            grid, patches = self._by_checkpoint(resized)
        tokens = grid[0] * grid[1] * grid[2] // self._processor.merge_size**2
        # What the encoder gets is hashed, so pixels, size and all the processor's settings count.
        # Processors have instructions for SHA-256: it takes half of BLAKE2's time.
        key = hashlib.sha256(repr((grid, type(patches).__name__)).encode() + self.settings_key)
        key.update(patches.pixels.data if isinstance(patches, PixelPatches) else patches.data)
        return ImageInput(patches=patches, grid=grid, tokens=tokens, key=key.digest()[:16])

    def _as_bytes(self, image: Image.Image) -> tuple[tuple[int, int, int], PixelPatches]:
        """An image of its final size. Patches come in squares of `merge_size` x `merge_size`, row by row of squares."""
        side, merge = self._processor.patch_size, self._processor.merge_size
        pixels = np.asarray(image)
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        squares = pixels.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
        patches = np.ascontiguousarray(squares.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(rows * columns, 3, side * side)
        assert self._scale is not None
        return (1, rows, columns), PixelPatches(patches, self._scale, self._processor.temporal_patch_size)

    def _by_checkpoint(self, image: Image.Image) -> tuple[tuple[int, int, int], np.ndarray]:
        output = self._processor(images=[image], return_tensors="np")
        frames, rows, columns = (int(n) for n in output["image_grid_thw"][0])
        return (frames, rows, columns), np.ascontiguousarray(output["pixel_values"])

    def _numbers_of_bytes(self) -> np.ndarray:
        """The number that the processor makes of each byte of each colour: float32 [3, 256]."""
        processor = self._processor
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if processor.do_rescale:
            values = processor.rescale(values, processor.rescale_factor)
        if processor.do_normalize:
            values = processor.normalize(values, processor.image_mean, processor.image_std)
        return np.ascontiguousarray(values, dtype=np.float32).reshape(3, 256)

    def _agrees(self) -> bool:
        """Whether bytes give the numbers of the checkpoint's processor."""
        side = TRIAL_SIDE * self._processor.patch_size * self._processor.merge_size
        pixels = np.random.default_rng(0).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
        image, final = self._resized(Image.fromarray(pixels))
        if not final:
            return False
        (grid, patches), (theirs, numbers) = self._as_bytes(image), self._by_checkpoint(image)
        return grid == theirs and np.array_equal(as_floats(patches), numbers)

    def _resized(self, image: Image.Image) -> tuple[Image.Image, bool]:
        """The image as the processor would resize it, so that it need not copy and convert the large one several times;
        and whether it then leaves it as it is."""
        processor = self._processor
        smart_resize = getattr(sys.modules[type(processor).__module__], "smart_resize", None)
        if smart_resize is None or not processor.do_resize:
            return image, False

        def target(width: int, height: int) -> tuple[int, int]:
            resized_height, resized_width = smart_resize(
                num_frames=processor.temporal_patch_size,
                height=height,
                width=width,
                temporal_factor=processor.temporal_patch_size,
                factor=processor.patch_size * processor.merge_size,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=processor.size["longest_edge"],
            )
            return resized_width, resized_height

        size = target(*image.size)
        if target(*size) != size:
            return image, False
        return image.resize(size, resample=processor.resample), True
