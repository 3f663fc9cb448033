"""Draws the pictures that the demo model knows: coloured shapes, printed numbers and words, blanks.

Owns geometry and paint; knows nothing of questions, tokens or tensors. All randomness comes from a `random.Random`, so a
seed determines a picture. Needs only Pillow and its built-in font.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (245, 140, 20),
    "yellow": (246, 216, 30),
    "green": (40, 160, 60),
    "blue": (35, 90, 220),
    "purple": (145, 50, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
WORD_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = ["CAT", "DOG", "SUN", "CAR", "BUS", "KEY", "BOX", "CUP", "HAT", "PEN", "MAP", "ICE", "SKY", "SEA", "RED", "ZOO", "JAM", "FOX", "BEE", "OWL", "HI", "GO", "NO", "YES", "UP", "ON", "OK", "STOP", "OPEN", "FISH", "BIRD", "TREE", "MILK", "BOOK", "STAR", "MOON", "RAIN", "SNOW", "SALE", "EXIT", "TAXI", "CAFE", "JUNE", "JULY", "FIRE", "WIND", "GAME", "QUIZ", "VIEW", "WAVE", "YARD", "ZERO", "KING", "LION", "PARK", "ROAD", "SHOP", "TIME", "UNIT", "VOTE", "WORK"]
MAX_ITEMS = 5
WHITE = (255, 255, 255)
BACKGROUNDS = (
    WHITE, WHITE, (245, 245, 245), (225, 225, 225), (250, 243, 225), (226, 238, 250),
    (232, 246, 230), (250, 232, 236), (205, 210, 215),
)  # fmt: skip
MIN_GAP_X = 0.045  # least distance of centres, as a share of the width, so that "from left to right" is unambiguous


@dataclass(frozen=True)
class Item:
    """One shape. `box` is (x1, y1, x2, y2) in shares of width and height, `size` the longer side in shares of the picture's
    shorter side."""

    color: str
    shape: str
    box: tuple[float, float, float, float]
    size: float

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """The content of a picture. `kind` is shapes, number, word or blank; items are ordered from left to right."""

    kind: str
    items: tuple[Item, ...] = ()
    text: str = ""
    text_color: str = ""
    char_boxes: tuple[tuple[str, tuple[float, float, float, float]], ...] = field(default=(), repr=False)


def draw_scene(
    rng: random.Random,
    size: tuple[int, int] = (224, 224),
    kind: str | None = None,
    count: int | None = None,
    most: int = MAX_ITEMS,
) -> tuple[Image.Image, Scene]:
    """Draw a random picture of `size` (width, height in pixels) with `count`, or up to `most`, shapes."""
    kind = kind or rng.choices(("shapes", "number", "word", "blank"), (0.70, 0.12, 0.14, 0.04))[0]
    if kind == "blank":
        return _background(rng, size), Scene("blank")
    if kind == "shapes":
        count = count or rng.choices(range(1, most + 1), (0.16, 0.22, 0.24, 0.22, 0.16)[:most])[0]
        return _draw_items(rng, size, _random_items(rng, count))
    return _draw_printed(rng, size, _random_text(rng, kind), kind)


def _random_items(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(colour, shape) pairs; in a third of the pictures items often share one or both, so that counting matters."""
    alike = 0.5 if rng.random() < 0.35 else 0.0
    items: list[tuple[str, str]] = []
    for _ in range(count):
        color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if items and rng.random() < alike:
            color = rng.choice(items)[0]
        if items and rng.random() < alike:
            shape = rng.choice(items)[1]
        items.append((color, shape))
    return items


def draw_shapes(shapes: list[tuple[str, str]], size: tuple[int, int] = (320, 240), seed: int = 0) -> Image.Image:
    """Draw (colour, shape) pairs, from left to right. Raises ValueError for an unknown name or too many."""
    for color, shape in shapes:
        if color not in COLORS or shape not in SHAPES:
            raise ValueError(f"cannot draw {color} {shape}. Colours: {list(COLORS)}. Shapes: {list(SHAPES)}")
    if len(shapes) > MAX_ITEMS:
        raise ValueError(f"at most {MAX_ITEMS} shapes. Given: {len(shapes)}")
    if not shapes:
        return _background(random.Random(seed), size)
    return _draw_items(random.Random(seed), size, shapes)[0]


def draw_on_white(
    rng: random.Random, shapes: list[tuple[str, str]], size: tuple[int, int]
) -> tuple[Image.Image, tuple[Item, ...]]:
    """Draw (colour, shape) pairs on white; also returns them with their boxes, from left to right."""
    picture, scene = _draw_items(rng, size, shapes, Image.new("RGB", size, WHITE))
    return picture, scene.items


def draw_text(
    text: str, size: tuple[int, int] = (320, 200), seed: int = 0, background: tuple[int, int, int] | None = None
) -> Image.Image:
    """Draw a number, or a word in capitals, on a random background or the given one."""
    picture = Image.new("RGB", size, background) if background else None
    return _draw_printed(random.Random(seed), size, text, "number" if text.isdigit() else "word", picture)[0]


def _random_text(rng: random.Random, kind: str) -> str:
    if kind == "number":
        return "".join(rng.choice("0123456789") for _ in range(rng.choices((1, 2, 3, 4), (1, 2, 2, 2))[0]))
    if rng.random() < 0.45:
        return rng.choice(WORDS)
    return "".join(rng.choice(WORD_LETTERS) for _ in range(rng.choice((2, 3, 4))))


def _background(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    first, second = rng.choice(BACKGROUNDS), rng.choice(BACKGROUNDS)
    picture = Image.new("RGB", size, first)
    if rng.random() < 0.25:  # a soft gradient
        mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
        picture.paste(Image.new("RGB", size, second), (0, 0), mask)
    return picture


def _shade(rng: random.Random, color: str) -> tuple[int, int, int]:
    spread = 10 if color in ("black", "orange", "yellow") else 18
    return tuple(max(0, min(255, c + rng.randint(-spread, spread))) for c in COLORS[color])  # type: ignore[return-value]


def _draw_items(
    rng: random.Random, size: tuple[int, int], shapes: list[tuple[str, str]], picture: Image.Image | None = None
) -> tuple[Image.Image, Scene]:
    picture = picture or _background(rng, size)
    draw = ImageDraw.Draw(picture)
    items = []
    for (color, shape), (cx, cy, radius) in zip(shapes, _circles(rng, size, len(shapes)), strict=True):
        points = _outline(shape, cx, cy, radius, _angle(rng, shape))
        _paint(draw, rng, points, _shade(rng, color), radius)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        box = (
            max(0.0, min(xs) / size[0]), max(0.0, min(ys) / size[1]),
            min(1.0, max(xs) / size[0]), min(1.0, max(ys) / size[1]),
        )  # fmt: skip
        items.append(Item(color, shape, box, 2 * radius / min(size)))
    return picture, Scene("shapes", tuple(sorted(items, key=lambda item: item.center[0])))


def _circles(rng: random.Random, size: tuple[int, int], count: int) -> list[tuple[float, float, float]]:
    """Circles (x, y, radius) from left to right that do not touch; they shrink with each failed attempt."""
    width, height = size
    short = min(size)
    largest = {1: 0.38, 2: 0.30, 3: 0.25, 4: 0.22, 5: 0.20}[count]
    for attempt in range(400):
        shrink = 0.997**attempt
        circles: list[tuple[float, float, float]] = []
        for _ in range(count):
            radius = short * shrink * rng.uniform(0.115 / shrink if shrink > 0.9 else 0.10, largest)
            x = rng.uniform(radius * 1.06, width - radius * 1.06)
            y = rng.uniform(radius * 1.06, height - radius * 1.06)
            apart = all(math.hypot(x - a, y - b) > radius + r + 0.02 * short for a, b, r in circles)
            if not apart or any(abs(x - a) < MIN_GAP_X * width for a, _, _ in circles):
                break
            circles.append((x, y, radius))
        if len(circles) == count:
            return sorted(circles)
    step = width / count  # one row always fits
    return [(step * (i + 0.5), height / 2, min(step, height) * 0.36) for i in range(count)]


def _angle(rng: random.Random, shape: str) -> float:
    return {"circle": 0.0, "heart": rng.uniform(-0.5, 0.5)}.get(shape, rng.uniform(0, 2 * math.pi))


def _outline(shape: str, cx: float, cy: float, radius: float, angle: float) -> list[tuple[float, float]]:
    if shape == "circle":
        unit = [(math.cos(t), math.sin(t)) for t in (2 * math.pi * i / 48 for i in range(48))]
    elif shape == "square":
        unit = [(0.75, 0.75), (-0.75, 0.75), (-0.75, -0.75), (0.75, -0.75)]
    elif shape == "triangle":
        unit = [(math.sin(2 * math.pi * i / 3), -math.cos(2 * math.pi * i / 3)) for i in range(3)]
    elif shape == "star":
        unit = []
        for i in range(10):
            reach = 1.0 if i % 2 == 0 else 0.42
            unit.append((reach * math.sin(math.pi * i / 5), -reach * math.cos(math.pi * i / 5)))
    elif shape == "heart":
        unit = []
        for i in range(40):
            t = 2 * math.pi * i / 40
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            unit.append((16 * math.sin(t) ** 3 / 17.5, -(y + 2.5) / 17.5))
    else:
        a, b = 0.30, 0.92
        unit = [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a), (-a, b)]
    cos, sin = math.cos(angle), math.sin(angle)
    return [(cx + radius * (x * cos - y * sin), cy + radius * (x * sin + y * cos)) for x, y in unit]


def _paint(
    draw: ImageDraw.ImageDraw, rng: random.Random, points: list[tuple[float, float]], ink: tuple[int, int, int], radius: float
) -> None:
    style = rng.choices(("filled", "hollow", "edged"), (0.6, 0.2, 0.2))[0]
    if style == "hollow":
        stroke = max(2, round(radius * rng.uniform(0.16, 0.26)))
        inside = [(x, y) for x, y in points]
        draw.line([*inside, inside[0], inside[1]], fill=ink, width=stroke, joint="curve")
    else:
        draw.polygon(points, fill=ink)
    if style == "edged":
        edge = tuple(int(c * 0.55) for c in ink)
        draw.line([*points, points[0], points[1]], fill=edge, width=max(1, round(radius * 0.08)), joint="curve")


def _draw_printed(
    rng: random.Random, size: tuple[int, int], text: str, kind: str, picture: Image.Image | None = None
) -> tuple[Image.Image, Scene]:
    picture = picture or _background(rng, size)
    width, height = size
    font_size = 100.0
    font = ImageFont.load_default(font_size)
    left, top, right, bottom = font.getbbox(text)
    fit = min(0.92 * width / (right - left), 0.80 * height / (bottom - top))
    # At least 0.62 of what fits, so that letters stay readable after the picture is scaled down.
    font_size = max(8.0, 100.0 * fit * rng.uniform(0.62, 0.97))
    font = ImageFont.load_default(font_size)
    stroke = rng.choice((0, 0, 1, 2)) * font_size / 50
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    x = rng.uniform(0.02 * width, max(0.02 * width, 0.98 * width - (right - left))) - left
    y = rng.uniform(0.04 * height, max(0.04 * height, 0.96 * height - (bottom - top))) - top
    color = rng.choice(("black", "black", "red", "green", "blue", "purple"))
    ImageDraw.Draw(picture).text((x, y), text, fill=_shade(rng, color), font=font, stroke_width=stroke)
    boxes = []
    for i, char in enumerate(text):
        start, end = x + font.getlength(text[:i]), x + font.getlength(text[: i + 1])
        boxes.append((char, (start / width, (y + top) / height, end / width, (y + bottom) / height)))
    return picture, Scene(kind, text=text, text_color=color, char_boxes=tuple(boxes))
