"""Places in a picture as the model writes them, in any of its bracket styles, read into one form.

Numbers are thousandths of the picture's width and height, from its upper left corner.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from api.parsing.image_references import mentions

MAX_PLACES = 200
FULL = 1000
Kind = Literal["bbox", "point", "polygon"]

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_QUAD = re.compile(r"[\[(<{]" + ",".join([_NUMBER] * 4) + r"[\])>}]")
_PAIR = re.compile(r"[\[(<{]" + ",".join([_NUMBER] * 2) + r"[\])>}]")
_NAMED = re.compile(r"\{[^{}]*\"(?:bbox_2d|point_2d)\"[^{}]*\}")
_LABELS = ("label", "name", "text", "category")


@dataclass(frozen=True)
class Grounding:
    """`points` are x, y pairs: the two corners of a box, one point, or the corners of a polygon."""

    kind: Kind
    points: tuple[tuple[int, int], ...]
    label: str | None = None
    picture: int | None = None  # of the request, from 0; None: the model does not say

    @property
    def normalized(self) -> bool:
        """False if the model wrote pixels or nonsense: such numbers mean no place in the picture."""
        return all(0 <= value <= FULL for point in self.points for value in point)


def read_wrapped(text: str, picture: int | None = None) -> tuple[Grounding, ...]:
    """Everything in a box tag that is a place, in `picture`. A plain answer gives nothing."""
    try:
        found = list(_walk(json.loads(text), None))
    except (ValueError, RecursionError):
        found = [_box(match.groups(), None) for match in _QUAD.finditer(text)]
        if not found and text.lstrip()[:1] in ("[", "(", "<") and text.lstrip()[1:].lstrip()[:1] in ("[", "(", "<"):
            found = [_point(match.groups(), None) for match in _PAIR.finditer(text)]
    return _kept(found, picture)


def read_named(text: str, pictures: int = 0, picture: int | None = None) -> tuple[Grounding, ...]:
    """Places in text without a box tag: only those that JSON calls `bbox_2d` or `point_2d`.

    Each is in the one of so many `pictures` that the text spoke of last, or else in `picture`.
    """
    found: list[Grounding] = []
    named = mentions(text, pictures)
    for match in _NAMED.finditer(text):
        before = bisect(named, (match.start(), pictures))
        with suppress(ValueError, RecursionError):
            found += _kept(_walk(json.loads(match[0]), None), named[before - 1][1] if before else picture)
    return tuple(found[:MAX_PLACES])


def _kept(found: list[Grounding | None], picture: int | None) -> tuple[Grounding, ...]:
    return tuple([replace(place, picture=picture) for place in found if place is not None][:MAX_PLACES])


def _walk(value: Any, label: str | None) -> list[Grounding | None]:
    """JSON: objects with `bbox_2d`, `point_2d` or `polygon`, bare quads, and points in a list of their own."""
    if isinstance(value, dict):
        named = next((value[word] for word in _LABELS if isinstance(value.get(word), str)), label)
        found: list[Grounding | None] = []
        for key, inner in value.items():
            if key == "bbox_2d":
                found += _walk(inner, named)
            elif key in ("point_2d", "points", "polygon"):
                found += _named_points(key, inner, named)
            elif isinstance(inner, list) and key != "bbox_3d" and any(isinstance(item, dict) for item in inner):
                found += _walk(inner, named)
        return found
    if not isinstance(value, list):
        return []
    if _numbers(value, 4):
        return [_box(value, label)]
    if value and all(_numbers(item, 2) for item in value):
        return [_point(item, label) for item in value]
    return [place for item in value for place in _walk(item, label)]


def _named_points(key: str, value: Any, label: str | None) -> list[Grounding | None]:
    points = [value] if _numbers(value, 2) else value if isinstance(value, list) else []
    if not points or not all(_numbers(point, 2) for point in points):
        return []
    if key == "polygon":
        return [Grounding("polygon", tuple(_pair(point) for point in points), label)]
    return [_point(point, label) for point in points]


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 10**6 for n in value)
    )


def _box(numbers: Any, label: str | None) -> Grounding | None:
    """Corners in either order; a box without area is none."""
    x1, y1, x2, y2 = (_rounded(number) for number in numbers)
    if x1 == x2 or y1 == y2:
        return None
    return Grounding("bbox", ((min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))), label)


def _point(numbers: Any, label: str | None) -> Grounding:
    return Grounding("point", (_pair(numbers),), label)


def _pair(numbers: Any) -> tuple[int, int]:
    x, y = (_rounded(number) for number in numbers)
    return x, y


def _rounded(number: Any) -> int:
    """A hair outside the picture is its edge."""
    value = round(float(number))
    return 0 if -10 <= value < 0 else value


def described(place: Grounding, sizes: tuple[tuple[int, int], ...], asked: int | None = None) -> dict[str, Any]:
    """A place as the API tells it: in the picture that the answer speaks of, else the one that was `asked` about,
    else the last one.

    `sizes` are width and height of the pictures of the request, upright.
    """
    out: dict[str, Any] = {} if place.label is None else {"label": place.label}
    out[f"{place.kind}_2d"] = _flat(place, place.points)
    if not place.normalized:
        out["normalized"] = False
    if sizes:
        number = next(n for n in (place.picture, asked, len(sizes) - 1) if n is not None)
        out["image"] = number
        if place.normalized:
            width, height = sizes[number]
            pixels = tuple((round(x * width / FULL), round(y * height / FULL)) for x, y in place.points)
            out[f"{place.kind}_pixels"] = _flat(place, pixels)
    return out


def _flat(place: Grounding, points: tuple[tuple[int, int], ...]) -> list[Any]:
    if place.kind == "polygon":
        return [list(point) for point in points]
    return [value for point in points for value in point]
