"""The sample images that the empty page offers."""

from __future__ import annotations

import pytest
from PIL import Image

from web.i18n.strings import LANGUAGES
from web.samples import FOLDER, Sample, sample_named, samples


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.file)
def test_a_sample_is_a_small_image_with_texts_in_every_language(sample: Sample) -> None:
    assert sample.path.stat().st_size < 30_000
    assert Image.open(sample.path).format == "PNG"
    assert set(sample.alt) == set(sample.questions) == set(LANGUAGES)
    assert len(sample.questions["en"]) == len(sample.questions["zh"])
    assert all(len(set(questions)) == len(questions) for questions in sample.questions.values())


def test_a_first_question_is_short_enough_for_its_button() -> None:
    assert all(len(sample.questions["en"][0]) <= 24 for sample in samples())
    assert all(len(sample.questions["zh"][0]) <= 10 for sample in samples())


def test_every_image_in_the_folder_is_a_sample() -> None:
    assert {path.name for path in FOLDER.glob("*.png")} == {sample.file for sample in samples()}


def test_a_sample_is_found_by_its_file() -> None:
    assert sample_named("word.png") in samples()
    assert sample_named("nothing.png") is None
