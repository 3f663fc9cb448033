"""The question about a picture: drawn anew each time, and right only if colour and shape are named."""

from __future__ import annotations

import random

import pytest

from models.shapes.pictures import COLORS, SHAPES
from monitor.observe.question import NAMES, about_picture


def test_every_picture_is_another_and_shows_a_shape_that_has_a_name() -> None:
    asked = [about_picture(random.Random(seed)) for seed in range(40)]

    assert len({question.body["messages"][0]["content"][0]["image_url"]["url"] for question in asked}) == 40
    things = [question.expected.split() for question in asked]
    assert {color for color, _ in things} == set(COLORS)
    assert {shape for _, shape in things} == set(NAMES) <= set(SHAPES)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The star is red.", True),
        ("A RED Star", True),
        ("The picture shows a star; its color is red.", True),
        ("The star is blue.", False),
        ("The circle is red.", False),
        ("It is red.", False),
        ("A star.", False),
        ("red, orange, yellow, green, blue: a star", False),
        ("a red circle, square, triangle, heart or star", False),
        ("The start is bored.", False),
        ("", False),
    ],
)
def test_an_answer_must_name_the_color_and_the_shape_and_no_other(answer: str, right: bool) -> None:
    question = next(q for seed in range(500) if (q := about_picture(random.Random(seed))).expected == "red star")

    assert question.is_right(answer) is right


def test_a_circle_may_be_called_a_disc() -> None:
    question = next(q for seed in range(500) if (q := about_picture(random.Random(seed))).expected == "blue circle")

    assert question.is_right("A blue disc.")
