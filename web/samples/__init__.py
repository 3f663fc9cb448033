"""The sample images of an empty chat and their questions. Knows nothing of Streamlit.

Owns the files of this folder: `python -m web.samples.draw` draws the images, `samples.json` holds the questions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sample:
    """`alt` and `questions`: by language; a click asks the first question."""

    file: str
    alt: dict[str, str]
    questions: dict[str, list[str]]

    @property
    def path(self) -> Path:
        return FOLDER / self.file


@cache
def samples() -> tuple[Sample, ...]:
    described = json.loads((FOLDER / "samples.json").read_text(encoding="utf-8"))
    return tuple(Sample(**each) for each in described)


def sample_named(file: str) -> Sample | None:
    return next((sample for sample in samples() if sample.file == file), None)
