"""Boxes, points and polygons drawn on an image."""

from __future__ import annotations

import io
from itertools import groupby

import pytest
from PIL import Image, ImageColor

from web.api_client.answer_stream import BoundingBox
from web.images.box_drawing import BOX_COLORS, draw_boxes


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_box_is_drawn_at_its_corners_and_nowhere_else() -> None:
    white = encoded(Image.new("RGB", (200, 100), "white"))

    drawn = opened(draw_boxes(white, (BoundingBox((250, 200, 750, 800)),))[0]).convert("RGB")

    assert drawn.size == (200, 100)
    on_the_edge = drawn.getpixel((50, 50))
    assert on_the_edge != (255, 255, 255)
    assert drawn.getpixel((100, 50)) == (255, 255, 255)
    assert drawn.getpixel((10, 50)) == (255, 255, 255)


@pytest.mark.parametrize("paper", ["white", "black", *BOX_COLORS])
def test_a_box_is_visible_on_a_background_of_any_colour(paper: str) -> None:
    flat = encoded(Image.new("RGB", (240, 240), paper))

    drawn = opened(draw_boxes(flat, (BoundingBox((250, 250, 750, 750)),))[0]).convert("RGB")

    line = [drawn.getpixel((x, 120)) for x in range(52, 68)]
    assert line[0] == line[-1] == ImageColor.getrgb(paper)
    strokes = [color for color, _ in groupby(line)]
    inks = {ImageColor.getrgb("white"), ImageColor.getrgb(BOX_COLORS[0])} - {ImageColor.getrgb(paper)}
    assert inks <= set(strokes)
    assert len(strokes) == (3 if paper == "white" else 5), strokes


def test_a_point_and_a_polygon_are_drawn_at_their_corners() -> None:
    white = encoded(Image.new("RGB", (200, 100), "white"))

    drawn = opened(draw_boxes(white, (BoundingBox((500, 500)), BoundingBox((50, 100, 300, 100, 50, 900))))[0]).convert("RGB")

    assert drawn.getpixel((101, 51)) != (255, 255, 255)
    row = [x for x in range(80) if drawn.getpixel((x, 50)) != (255, 255, 255)]
    assert row
    assert all(8 <= x <= 12 or 32 <= x <= 37 for x in row), "the upright side and the slanting one"
    assert len({x < 20 for x in row}) == 2


def test_a_box_around_the_whole_image_stays_inside_it() -> None:
    white = encoded(Image.new("RGB", (40, 30), "white"))

    drawn = opened(draw_boxes(white, (BoundingBox((0, 0, 1000, 1000)), BoundingBox((0, 0, 1, 1))))[0]).convert("RGB")

    assert drawn.getpixel((39, 15)) != (255, 255, 255)
