"""The shipped checkpoint answers freshly drawn pictures as its card promises."""

import random

import pytest

from models.shapes.checkpoint import FOLDER
from models.shapes.eval import FLOORS, Model, Trial, judge, trials, user
from models.shapes.pictures import draw_shapes
from models.shapes.wording import Question


@pytest.fixture(scope="module")
def model():
    return Model(FOLDER, "cpu")


def ask(model, picture, text):
    question = Question("color", "en", text, "", "")
    return model.answer(Trial("color", "en", picture.size, [user(text, 1)], [picture], question, False)).strip()


@pytest.fixture(scope="module")
def judged(model):
    scores = {}
    for trial in trials(random.Random("a seed that training never used"), 18):
        score, formed = judge(trial, model.answer(trial))
        scores.setdefault(trial.score, []).append(score)
        scores.setdefault("format", []).append(float(formed))
    return scores


@pytest.mark.parametrize("family", FLOORS)
def test_a_family_is_answered_as_the_card_promises(judged, family):
    scores = judged[family]

    # few trials: what a model exactly at its floor may miss by chance (about two standard deviations) is allowed
    floor = FLOORS[family]
    slack = 2 * (floor * (1 - floor) / len(scores)) ** 0.5
    assert sum(scores) / len(scores) >= floor - slack


def test_two_pictures_get_two_answers_and_a_blank_one_neither(model):
    question = "What color is the circle?"

    assert ask(model, draw_shapes([("red", "circle")], seed=11), question).startswith("The circle is red.")
    assert ask(model, draw_shapes([("blue", "circle")], seed=11), question).startswith("The circle is blue.")
    assert ask(model, draw_shapes([], seed=11), question).startswith("There is no circle in the picture.")
