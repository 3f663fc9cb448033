"""The shipped checkpoint answers freshly drawn pictures as well as its card says."""

import random
from pathlib import Path

import pytest
from PIL import Image

from models.shapes.checkpoint import FOLDER
from models.shapes.eval import FLOORS, Model, Trial, judge, trials, user
from models.shapes.pictures import draw_shapes
from models.shapes.wording import Question

BATCH = 32


@pytest.fixture(scope="module")
def model():
    return Model(FOLDER, "cpu")


def ask(model, picture, text):
    question = Question("color", "en", text, "", "")
    return model.answer(Trial("color", "en", picture.size, [user(text, 1)], [picture], question, False)).strip()


@pytest.fixture(scope="module")
def judged(model):
    scores = {}
    drawn = list(trials(random.Random("a seed that training never used"), 18))
    drawn.sort(key=lambda trial: sum(picture.width * picture.height for picture in trial.pictures))  # little padding
    for start in range(0, len(drawn), BATCH):
        batch = drawn[start : start + BATCH]
        for trial, answer in zip(batch, model.answers(batch), strict=True):
            score, formed = judge(trial, answer)
            scores.setdefault(trial.score, []).append(score)
            scores.setdefault("format", []).append(float(formed))
    return scores


@pytest.mark.parametrize("family", FLOORS)
def test_a_family_reaches_its_floor(judged, family):
    scores = judged[family]

    # few trials: what a model exactly at its floor may miss by chance (about two standard deviations) is allowed
    floor = FLOORS[family]
    slack = 2 * (floor * (1 - floor) / len(scores)) ** 0.5
    assert sum(scores) / len(scores) >= floor - slack


def test_answers_depend_on_the_picture(model):
    question = "What color is the circle?"

    assert ask(model, draw_shapes([("red", "circle")], seed=11), question).startswith("The circle is red.")
    assert ask(model, draw_shapes([("blue", "circle")], seed=11), question).startswith("The circle is blue.")
    assert ask(model, draw_shapes([], seed=11), question).startswith("There is no circle in the picture.")


SAMPLES = Path(__file__).resolve().parents[2] / "web" / "samples"


@pytest.mark.parametrize(
    ("file", "question", "word"),
    [
        ("shapes.png", "What color is the star?", "blue"),
        ("count.png", "Count the shapes.", "5"),
        ("word.png", "What word is it?", "CAT"),
        ("place.png", "Where is the heart?", "<|begin_of_box|>[["),
        ("place.png", "Is the blue square to the left of the red heart?", "Yes, the blue square is to the left"),
        ("place.png", "Check the rule: no red shapes.", "Yes, it breaks the rule: there is a red heart."),
        ("shapes.png", "描述这张图片。", "从左到右：红色圆形、蓝色星形、绿色正方形。"),
    ],
)
def test_the_samples_of_the_page_are_answered_correctly(model, file, question, word):
    assert word in ask(model, Image.open(SAMPLES / file).convert("RGB"), question)
