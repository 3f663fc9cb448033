"""The image question: a new image each time; an answer is right only if it names color and shape."""

from __future__ import annotations

import random

import pytest

from models.shapes.pictures import COLORS, SHAPES
from monitor.observe.question import NAMES, image_question


def test_every_image_is_different_and_shows_a_shape_with_a_known_name() -> None:
    asked = [image_question(random.Random(seed)) for seed in range(40)]

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
    question = next(q for seed in range(500) if (q := image_question(random.Random(seed))).expected == "red star")

    assert question.is_right(answer) is right


def test_a_circle_may_be_called_a_disc() -> None:
    question = next(q for seed in range(500) if (q := image_question(random.Random(seed))).expected == "blue circle")

    assert question.is_right("A blue disc.")
