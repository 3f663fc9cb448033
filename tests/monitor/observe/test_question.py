"""The questions of each kind: new each time, and right only if the answer says what was drawn."""

from __future__ import annotations

import base64
import io
import json
import random

import pytest
from PIL import Image

from models.shapes.pictures import COLORS, SHAPES
from monitor.observe.question import COLOR_NAMES, NAMES, PICTURE_KINDS, QUESTIONS, TEXT_KINDS, Question, draw, overlap


def asked(kind: str, expected: str) -> Question:
    return next(q for seed in range(3000) if (q := draw(kind, random.Random(seed))).expected == expected)


def picture_of(question: Question) -> Image.Image:
    url = question.body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_question_is_drawn_anew(kind: str) -> None:
    bodies = {json.dumps(draw(kind, random.Random(seed)).body) for seed in range(40)}

    assert len(bodies) > (25 if kind == "absent" else 30)


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_pictures_have_a_white_background(kind: str) -> None:
    assert {picture_of(draw(kind, random.Random(seed))).getpixel((0, 0)) for seed in range(20)} == {(255, 255, 255)}


def test_every_color_and_shape_that_is_asked_about_has_names() -> None:
    things = [draw("color", random.Random(seed)).expected.split() for seed in range(200)]

    assert {color for color, _ in things} == set(COLORS) == set(COLOR_NAMES)
    assert {shape for _, shape in things} == set(NAMES) <= set(SHAPES)


def test_a_schema_binds_the_answer_to_the_known_names() -> None:
    schema = draw("color", random.Random(1)).body["response_format"]["json_schema"]["schema"]

    thing = schema["properties"]["objects"]["items"]["properties"]
    assert set(thing["color"]["enum"]) == set(COLORS) and set(thing["shape"]["enum"]) == set(NAMES)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_the_plain_form_has_only_fields_that_every_server_knows(kind: str) -> None:
    plain = draw(kind, random.Random(1)).plain

    assert set(plain) == {"messages", "max_tokens", "temperature", "stream"}
    assert plain["max_tokens"] >= 512, "room for thoughts"


@pytest.mark.parametrize(
    ("answer", "color", "shape"),
    [
        ('{"objects": [{"color": "red", "shape": "star"}]}', True, True),
        ("The star is red.", True, True),
        ("A RED Star", True, True),
        ("A crimson five-pointed star on a light blue background.", True, True),
        ("<think>Is it blue? A heart?</think>It is a red star.", True, True),
        ("一颗红色的五角星", True, True),
        ("The star is blue.", False, True),
        ("The circle is red.", True, False),
        ("It is red.", True, False),
        ("A star.", False, True),
        ("red, orange, yellow, green, blue: a star", False, True),
        ("a red circle, square, triangle, heart or star", True, False),
        ("The start is bored.", False, False),
        ("", False, False),
    ],
)
def test_color_and_shape_are_judged_by_themselves(answer: str, color: bool, shape: bool) -> None:
    assert asked("color", "red star").tries(answer) == {"color": color, "shape": shape}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("There are 3 shapes.", True),
        ("**3**", True),
        ("There are three shapes.", True),
        ("图中有3个形状。", True),
        ("图中有三个形状", True),
        ("There are 2 shapes.", False),
        ("There are 13 shapes.", False),
        ("1, 2, 3, 4", False),
        ("Some.", False),
    ],
)
def test_a_count_is_one_number(answer: str, right: bool) -> None:
    assert asked("count", "3").tries(answer) == {"count": right}


def test_a_number_is_read_exactly() -> None:
    question = draw("read", random.Random(3))
    number = question.expected

    assert question.tries(f'The number is "{number}".') == {"read": True}
    assert question.tries(f"The number is {number}0.") == question.tries(f"{number} or 17") == {"read": False}


@pytest.mark.parametrize("seed", range(8))
def test_a_box_must_overlap_the_shape_by_more_than_half(seed: int) -> None:
    question = draw("where", random.Random(seed))
    x1, y1, x2, y2 = (int(v) for v in question.expected.partition("[")[2].rstrip("]").split(","))

    width, height = picture_of(question).size
    assert width != height, "on a square, exchanged axes would go unseen"
    assert question.tries(f"<|begin_of_box|>[[{x1},{y1},{x2},{y2}]]<|end_of_box|>") == {"where": True}
    shift = x2 - x1
    assert question.tries(f"[{x1 + shift // 2}, {y1}, {x2 + shift // 2}, {y2}]") == {"where": False}
    assert question.tries("in the upper left") == {"where": False}


def test_overlap_is_the_shared_part_of_both() -> None:
    assert overlap([0, 0, 10, 10], [0, 0, 10, 10]) == 1.0
    assert overlap([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert overlap([0, 0, 10, 10], [20, 20, 30, 30]) == overlap([5, 5, 5, 5], [5, 5, 5, 5]) == 0.0


def test_arithmetic_and_copying_have_one_right_answer() -> None:
    sum_of = draw("arithmetic", random.Random(5))
    assert sum_of.tries(sum_of.expected) == sum_of.tries(f"11 + 22 = {sum_of.expected}") == {"arithmetic": True}
    assert sum_of.tries(str(int(sum_of.expected) + 1)) == {"arithmetic": False}
    word = draw("copy", random.Random(5))
    assert word.tries(json.dumps({"word": word.expected})) == {"copy": True}
    assert word.tries("apple river stone cloud tiger candle") == {"copy": False}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("I see no picture. Please send one first.", True),
        ("I don't see an image here.", True),
        ("Please upload the picture that you mean.", True),
        ("我没有看到图片。", True),
        ("There are 3 red hearts.", False),
        ("I am a demo.", False),
    ],
)
def test_a_picture_that_is_not_there_must_be_missed(answer: str, right: bool) -> None:
    assert draw("absent", random.Random(2)).tries(answer) == {"absent": right}


def test_text_kinds_need_no_picture() -> None:
    assert all(isinstance(draw(kind, random.Random(1)).body["messages"][0]["content"], str) for kind in TEXT_KINDS)
