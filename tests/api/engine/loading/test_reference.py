"""A new revision is compared with transformers once, and a difference is told."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from api.engine.config import EngineConfig
from api.engine.loaded_model import Model
from api.engine.loading import reference
from api.engine.loading.loader import load
from api.engine.model.runner import Glm4vRunner


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "glm-web" / reference.REFERENCE_FILE


def loaded(checkpoint: Path) -> Model:
    config = EngineConfig(model=str(checkpoint), threads=1, device="cpu", slots=2, check_reference=True)
    return load(config, lambda fraction: None)


def test_a_revision_that_agrees_is_compared_once(tiny_checkpoint: Path, cache: Path, monkeypatch) -> None:
    assert loaded(tiny_checkpoint).integrity.reference.outcome == "same"
    assert len(json.loads(cache.read_text())) == 1
    monkeypatch.setattr(Glm4vRunner, "answer_alone", lambda *_: pytest.fail("compared again"))

    again = loaded(tiny_checkpoint).integrity.reference

    assert again.outcome == "same" and "agree with transformers" in again.detail
    file = tiny_checkpoint / "config.json"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # another revision
    monkeypatch.setattr(reference, "NEEDS_BYTES", 2**60)
    assert loaded(tiny_checkpoint).integrity.reference.outcome == "off"


def other_token(self: Glm4vRunner, sequence, observe=None) -> torch.Tensor:
    return -ORIGINAL(self, sequence, observe)


def not_a_number(self: Glm4vRunner, sequence, observe=None) -> torch.Tensor:
    return ORIGINAL(self, sequence, observe) * float("nan")


ORIGINAL = Glm4vRunner.answer_alone


@pytest.mark.parametrize("wrong", [other_token, not_a_number])
def test_other_tokens_are_told_and_compared_again(wrong, tiny_checkpoint, cache, monkeypatch, caplog) -> None:
    monkeypatch.setattr(Glm4vRunner, "answer_alone", wrong)
    with caplog.at_level(logging.ERROR):
        found = loaded(tiny_checkpoint).integrity.reference

    assert found.outcome == "differs" and not cache.exists()
    assert all(f"{name}: the most probable token" in found.detail for name in ("square", "3:1", "tiny", "text"))
    assert "event=reference outcome=differs" in caplog.text


def test_other_positions_are_told(tiny_checkpoint, monkeypatch) -> None:
    original = reference.rope_positions
    monkeypatch.setattr(reference, "rope_positions", lambda *a: (original(*a)[0] + 1, 0))

    found = loaded(tiny_checkpoint).integrity.reference

    assert found.outcome == "differs" and "tiny: the positions of the tokens differ" in found.detail


def test_a_comparison_that_cannot_be_made_stops_nothing(tiny_checkpoint, monkeypatch) -> None:
    def failing(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(Glm4vRunner, "answer_alone", failing)

    found = loaded(tiny_checkpoint).integrity.reference

    assert (found.outcome, found.detail) == ("off", "skipped: RuntimeError: no such operation")
