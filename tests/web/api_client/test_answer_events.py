"""The lines of an event stream as events."""

from __future__ import annotations

import json

import pytest

from web.api_client.answer_stream import BoundingBox, Event, EventReader, Finished, InvalidBox, TextDelta
from web.api_client.client import ApiError


def lines(*chunks: object) -> list[str]:
    return [f"data: {json.dumps(chunk)}" for chunk in chunks]


def read(*boxes: object) -> list[Event]:
    return list(EventReader().read(lines({"choices": [{"delta": {"boxes": boxes}}]})[0]))


def test_malformed_boxes_are_ignored() -> None:
    malformed = ({"bbox_2d": [300, 20, 10, 400]}, {"bbox_2d": [1, 2, 3]}, {"bbox_2d": "all"}, {"polygon_2d": [[1, 2]]},
                {"bbox_2d": [1, 2, 3, 4], "image": "one"}, "nonsense")  # fmt: skip

    assert read({"bbox_2d": [10, 20, 300, 400], "image": 1}, *malformed) == [BoundingBox((10, 20, 300, 400), 1)]


def test_points_and_polygons_are_read_like_boxes() -> None:
    point = {"label": "nose", "point_2d": [500, 250], "image": 0, "point_pixels": [100, 25]}
    polygon = {"polygon_2d": [[1, 2], [3, 4], [5, 0]]}

    assert read(point, polygon) == [BoundingBox((500, 250), 0, "nose", (100, 25)), BoundingBox((1, 2, 3, 4, 5, 0))]


def test_coordinates_beyond_a_thousand_make_an_invalid_box() -> None:
    assert read({"bbox_2d": [10, 20, 1300, 400], "normalized": False}) == [InvalidBox()]


def test_a_line_that_is_not_json_raises_an_api_error() -> None:
    with pytest.raises(ApiError) as caught:
        list(EventReader("r7").read("data: {broken"))

    assert (caught.value.kind, caught.value.request_id) == ("broken", "r7")


def test_an_engine_without_usage_or_timings_still_finishes() -> None:
    reader = EventReader()
    events = [
        event
        for line in [*lines({"choices": [{"delta": {"content": "Hi"}, "finish_reason": "length"}]}), "data: [DONE]"]
        for event in reader.read(line)
    ]

    assert events == [TextDelta("Hi"), Finished("length")]
    assert reader.done
