"""References to images in the text decide which image a region is in."""

from __future__ import annotations

from typing import Any

import pytest
from served import image_part, text_part

from api.parsing.boxes import image_references


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In the first picture, and then in the Second image.", [0, 1]),
        ("image 2", [1]),
        ("Image #3: a cat. Photo no. 1: a dog.", [2, 0]),
        ("the 2nd photo", [1]),
        ("the last picture", [2]),
        ("第二张图里的猫", [1]),
        ("图1和图片3", [0, 2]),
        ("第3张，最后一张", [2, 2]),
        ("picture 4", []),  # there are only three
        ("image 0", []),
        ("image 2000 px wide", []),
        ("in the picture 2 cats sit, and this image 1 dog", []),
        ("the first star of the picture", []),
        ("图一共有三个", []),
        ("第一个是红色", []),
    ],
)
def test_references(text: str, expected: list[int]) -> None:
    assert [index for _, index in image_references(text, 3)] == expected


def test_a_single_image_is_never_referred_to() -> None:
    assert image_references("the first picture", 1) == []


BOX = "<|begin_of_box|>[[0,0,500,500]]<|end_of_box|>"
JSON = '{"bbox_2d": [0, 0, 500, 500], "label": "cat"}'


@pytest.mark.parametrize(
    ("answer", "question", "images"),
    [
        (BOX, "Where is it?", [2]),
        (BOX, "Where is it in the first picture?", [0]),
        (BOX, "Compare image 1 and image 2.", [2]),  # two in the question: undecided
        (f"In image 2: {BOX}. In image 1: {BOX}", "Where is it in the last picture?", [1, 0]),
        (f"<think>I look at the second picture.</think>{BOX}", "Where is it?", [1]),
        (f"Image 1: {JSON} Image 2: {JSON}", "Where?", [0, 1]),
        (f"<think>the second image</think>{JSON}", "Where?", [1]),
    ],
)
def test_a_region_is_in_the_image_that_the_answer_or_the_question_refers_to(
    answer: str, question: str, images: list[int], serve
) -> None:
    sizes = ((100, 50), (200, 60), (300, 70))
    content: Any = [*(image_part("red", size) for size in sizes), text_part(question)]

    served = serve(answer=lambda prompt, images: answer)
    boxes = served.chat(content).json()["choices"][0]["message"]["boxes"]

    assert [box["image"] for box in boxes] == images
    for box in boxes:
        width, height = sizes[box["image"]]
        assert box["bbox_pixels"] == [0, 0, width // 2, height // 2]


def test_only_the_last_question_counts(serve) -> None:
    served = serve(answer=lambda prompt, images: BOX)
    first = [image_part(), image_part(), text_part("What is in the first picture?")]
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": "Where is it?"}]  # fmt: skip

    answer = served.client.post("/v1/chat/completions", json={"messages": messages})

    assert [box["image"] for box in answer.json()["choices"][0]["message"]["boxes"]] == [1]
