"""Answers the image question from its pixels, as a model would: the named color that covers most of it, and the shape."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from models.shapes.pictures import COLORS, draw_shapes
from monitor.observe.question import NAMES


def describe(body: dict[str, Any]) -> str:
    """Color and shape in the image of a chat completion request."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    color = max(COLORS, key=lambda name: int(painted(picture, name).sum()))
    form = outline(picture, color)
    shape = max(NAMES, key=lambda name: max(float((form == known).mean()) for known in known_outlines(name)))
    return f"{color} {shape}"


def completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def painted(picture: Image.Image, color: str) -> np.ndarray:
    """Where the color is the nearest of the named ones, and near: [height, width]."""
    pixels = np.asarray(picture.convert("RGB"), dtype=int)[:, :, None]
    distances = np.abs(pixels - np.array(list(COLORS.values()))).sum(axis=-1)
    return (distances.argmin(axis=-1) == list(COLORS).index(color)) & (distances.min(axis=-1) < 70)


def outline(picture: Image.Image, color: str) -> np.ndarray:
    """The pixels of the color, scaled to a square: [24, 24]."""
    where = Image.fromarray(painted(picture, color)).convert("L").filter(ImageFilter.MedianFilter(7))
    return np.asarray(where.crop(where.getbbox()).resize((24, 24))) > 127


@cache
def known_outlines(shape: str) -> list[np.ndarray]:
    return [outline(draw_shapes([("blue", shape)], size=(224, 224), seed=seed), "blue") for seed in range(30)]
