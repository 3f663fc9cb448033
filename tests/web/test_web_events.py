"""What the lines of a stream mean."""

from __future__ import annotations

import json

import pytest

from web.client import ApiError
from web.events import Box, EventReader, Finished, Text


def lines(*chunks: object) -> list[str]:
    return [f"data: {json.dumps(chunk)}" for chunk in chunks]


def test_boxes_outside_the_picture_are_not_taken() -> None:
    boxes = [
        {"bbox_2d": [10, 20, 300, 400], "image": 1},
        {"bbox_2d": [10, 20, 1300, 400]},
        {"bbox_2d": [300, 20, 10, 400]},
        {"bbox_2d": [1, 2, 3]},
        {"bbox_2d": "all"},
        "nonsense",
    ]

    events = list(EventReader().read(lines({"choices": [{"delta": {"boxes": boxes}}]})[0]))

    assert events == [Box((10, 20, 300, 400), 1)]


def test_a_line_that_is_no_json_is_an_error_and_not_a_crash() -> None:
    with pytest.raises(ApiError) as caught:
        list(EventReader("r7").read("data: {broken"))

    assert (caught.value.kind, caught.value.request_id) == ("broken", "r7")


def test_another_engine_without_usage_or_timings_still_ends() -> None:
    reader = EventReader()
    events = [
        event
        for line in [*lines({"choices": [{"delta": {"content": "Hi"}, "finish_reason": "length"}]}), "data: [DONE]"]
        for event in reader.read(line)
    ]

    assert events == [Text("Hi"), Finished("length")]
    assert reader.done
