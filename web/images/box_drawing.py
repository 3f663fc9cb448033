"""Draws the bounding boxes, points and polygons of an answer on the image that they belong to."""

from __future__ import annotations

import io
from functools import lru_cache
from itertools import cycle

from PIL import Image, ImageDraw, ImageFont

from web.api_client.answer_stream import BoundingBox
from web.images.attached_image import encode

MAX_BOXES = 200
BOX_COLORS = ("#3e63dd", "#e5484d", "#30a46c", "#f76b15", "#8e4ec6", "#0090ff", "#d6409f", "#978365")


@lru_cache(maxsize=16)
def draw_boxes(data: bytes, boxes: tuple[BoundingBox, ...]) -> tuple[bytes, str]:
    """(bytes, MIME type) of the image with its boxes drawn, numbered if there are several."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 120))
    for number, box in enumerate(boxes[:MAX_BOXES], start=1):
        color = BOX_COLORS[(number - 1) % len(BOX_COLORS)]
        scaled = [value / 1000 * (side - 1) for value, side in zip(box.corners, cycle(image.size), strict=False)]
        _outline(draw, list(zip(scaled[::2], scaled[1::2], strict=True)), color, line)
        if len(boxes) > 1:
            _number(draw, scaled[0], scaled[1], str(number), color, line)
    return encode(image, lossless=True)


def _outline(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], color: str, line: int) -> None:
    """A coloured line between two white ones, visible on a background of any colour."""
    rim = max(1, line // 2)
    if len(points) == 1:
        (x, y), radius = points[0], 2 * line
        draw.ellipse([x - radius - rim, y - radius - rim, x + radius + rim, y + radius + rim], fill="white")
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    elif len(points) == 2:
        (left, top), (right, bottom) = points
        draw.rectangle([left - rim, top - rim, right + rim, bottom + rim], outline="white", width=line + 2 * rim)
        draw.rectangle([left, top, right, bottom], outline=color, width=line)
    else:
        around = [*points, points[0], points[1]]  # beyond the first corner, so that it is joined too
        draw.line(around, fill="white", width=line + 2 * rim, joint="curve")
        draw.line(around, fill=color, width=line, joint="curve")


def _number(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, color: str, line: int) -> None:
    font = ImageFont.load_default(size=max(12, line * 6))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = line + 1
    draw.rectangle([x, y, x + (right - left) + 2 * pad, y + (bottom - top) + 2 * pad], fill=color)
    draw.text((x + pad - left, y + pad - top), text, fill="white", font=font)
