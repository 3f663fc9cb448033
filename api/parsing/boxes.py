"""Regions of an image (bounding boxes, points, polygons) as the model writes them, read into one form.

Also finds the image that a region is in, by references in prose: "the second image", "image 2", "图2", "第二张图".
Numbers are thousandths of the image's width and height, from its upper left corner.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

MAX_REGIONS = 200
SCALE = 1000
Kind = Literal["bbox", "point", "polygon"]

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_QUAD = re.compile(r"[\[(<{]" + ",".join([_NUMBER] * 4) + r"[\])>}]")
_PAIR = re.compile(r"[\[(<{]" + ",".join([_NUMBER] * 2) + r"[\])>}]")
_NAMED = re.compile(r"\{[^{}]*\"(?:bbox_2d|point_2d)\"[^{}]*\}")
_LABELS = ("label", "name", "text", "category")
_ENGLISH = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_CHINESE = "一二三四五六七八九十"
_LAST = ("last", "最后")
_IMAGE_WORD = r"(?:picture|image|photo(?:graph)?)"
_REFERENCE = re.compile(
    rf"\b({'|'.join(_ENGLISH)}|last)\s+{_IMAGE_WORD}\b"
    rf"|\b(\d\d?)(?:st|nd|rd|th)\s+{_IMAGE_WORD}\b"
    # In "in the picture 3 cats" the number counts cats.
    rf"|(?<!\bthe )(?<!\bthis )(?<!\beach )\b{_IMAGE_WORD}\s*(?:no\.\s*|number\s+|#\s*)?(\d\d?)\b"
    rf"|第\s*([{_CHINESE}]|\d\d?)\s*(?:张|幅|个?图)"
    rf"|图[片像]?\s*(\d\d?)(?!\d)"
    rf"|(最后)一?(?:张|幅|个?图)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Region:
    """`points` are x, y pairs: two opposite corners of a bounding box, one point, or the corners of a polygon."""

    kind: Kind
    points: tuple[tuple[int, int], ...]
    label: str | None = None
    image: int | None = None  # of the request, from 0; None: the model does not refer to one

    @property
    def normalized(self) -> bool:
        """False if the numbers leave the range 0 to 1000 and so are no thousandths (pixels, perhaps)."""
        return all(0 <= value <= SCALE for point in self.points for value in point)


def read_tagged(text: str, image: int | None = None) -> tuple[Region, ...]:
    """All regions inside one pair of box tags, each in `image`. A tagged answer in words gives none."""
    regions: list[Region | None]
    try:
        regions = _walk(json.loads(text), None)
    except (ValueError, RecursionError):
        regions = [_box(match.groups(), None) for match in _QUAD.finditer(text)]
        if not regions and text.lstrip()[:1] in ("[", "(", "<") and text.lstrip()[1:].lstrip()[:1] in ("[", "(", "<"):
            regions = [_point(match.groups(), None) for match in _PAIR.finditer(text)]
    return _in_image(regions, image)


def read_untagged(text: str, images: int = 0, image: int | None = None) -> tuple[Region, ...]:
    """Regions in text outside of box tags: only those that JSON calls `bbox_2d` or `point_2d`.

    Each is in the image that the text before it refers to last, of so many `images`, or else in `image`.
    """
    regions: list[Region] = []
    references = image_references(text, images)
    for match in _NAMED.finditer(text):
        before = bisect(references, (match.start(), images))
        with suppress(ValueError, RecursionError):
            regions += _in_image(_walk(json.loads(match[0]), None), references[before - 1][1] if before else image)
    return tuple(regions[:MAX_REGIONS])


def _in_image(regions: list[Region | None], image: int | None) -> tuple[Region, ...]:
    return tuple([replace(region, image=image) for region in regions if region is not None][:MAX_REGIONS])


def _walk(value: Any, label: str | None) -> list[Region | None]:
    """JSON: objects with `bbox_2d`, `point_2d` or `polygon`, bare quads, and points in a list of their own."""
    if isinstance(value, dict):
        own_label = next((value[name] for name in _LABELS if isinstance(value.get(name), str)), label)
        regions: list[Region | None] = []
        for key, inner in value.items():
            if key == "bbox_2d":
                regions += _walk(inner, own_label)
            elif key in ("point_2d", "points", "polygon"):
                regions += _labelled_points(key, inner, own_label)
            elif isinstance(inner, list) and key != "bbox_3d" and any(isinstance(item, dict) for item in inner):
                regions += _walk(inner, own_label)
        return regions
    if not isinstance(value, list):
        return []
    if _numbers(value, 4):
        return [_box(value, label)]
    if value and all(_numbers(item, 2) for item in value):
        return [_point(item, label) for item in value]
    return [region for item in value for region in _walk(item, label)]


def _labelled_points(key: str, value: Any, label: str | None) -> list[Region | None]:
    points = [value] if _numbers(value, 2) else value if isinstance(value, list) else []
    if not points or not all(_numbers(point, 2) for point in points):
        return []
    if key == "polygon":
        return [Region("polygon", tuple(_pair(point) for point in points), label)]
    return [_point(point, label) for point in points]


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 10**6 for n in value)
    )


def _box(numbers: Any, label: str | None) -> Region | None:
    """Corners in either order; a box without area is dropped."""
    x1, y1, x2, y2 = (_rounded(number) for number in numbers)
    if x1 == x2 or y1 == y2:
        return None
    return Region("bbox", ((min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))), label)


def _point(numbers: Any, label: str | None) -> Region:
    return Region("point", (_pair(numbers),), label)


def _pair(numbers: Any) -> tuple[int, int]:
    x, y = (_rounded(number) for number in numbers)
    return x, y


def _rounded(number: Any) -> int:
    """A value slightly below 0 counts as the edge."""
    value = round(float(number))
    return 0 if -10 <= value < 0 else value


def region_entry(
    region: Region, sizes: tuple[tuple[int, int], ...], question_image: int | None = None
) -> dict[str, Any]:
    """An entry of the answer's `boxes`.

    The image is the one that the answer refers to, else `question_image`, to which the question refers, else the last.
    `sizes` are width and height in pixels of the request's images, upright.
    """
    out: dict[str, Any] = {} if region.label is None else {"label": region.label}
    out[f"{region.kind}_2d"] = _flat(region, region.points)
    if not region.normalized:
        out["normalized"] = False
    if sizes:
        number = next(n for n in (region.image, question_image, len(sizes) - 1) if n is not None)
        out["image"] = number
        if region.normalized:
            width, height = sizes[number]
            pixels = tuple((round(x * width / SCALE), round(y * height / SCALE)) for x, y in region.points)
            out[f"{region.kind}_pixels"] = _flat(region, pixels)
    return out


def _flat(region: Region, points: tuple[tuple[int, int], ...]) -> list[Any]:
    if region.kind == "polygon":
        return [list(point) for point in points]
    return [value for point in points for value in point]


def image_references(text: str, images: int) -> list[tuple[int, int]]:
    """Where each reference to one of so many images ends in the text, and which image it means, from 0."""
    if images < 2:
        return []
    references = [
        (match.end(), _index(next(filter(None, match.groups())).lower(), images)) for match in _REFERENCE.finditer(text)
    ]
    return [(end, index) for end, index in references if 0 <= index < images]


def _index(word: str, images: int) -> int:
    if word in _LAST:
        return images - 1
    if word in _ENGLISH:
        return _ENGLISH.index(word)
    return _CHINESE.index(word) if word in _CHINESE else int(word) - 1
