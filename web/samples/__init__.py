"""Owns the sample images of an empty chat, which `draw.py` draws, and their questions in `samples.json`.
It may not know Streamlit or any other room.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sample:
    """`alt` and `questions` are by language; a click on the sample asks the first question."""

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
