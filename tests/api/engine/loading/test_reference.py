"""A new revision is compared with transformers once, and a difference is told."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from api.engine.config import EngineConfig
from api.engine.loaded_model import Model
from api.engine.loading import reference
from api.engine.loading.loader import load
from api.engine.loading.reference import LayeredNetwork
from api.engine.model.runner import Glm4vRunner
from models.shapes.checkpoint import FOLDER as SHAPES


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
    monkeypatch.setattr(reference, "ACTIVATION_BYTES", 2**60)
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


@pytest.mark.parametrize("weights", ["fp8", "nf4"])
def test_quantised_weights_agree_within_their_own_limit(weights: str, tmp_path: Path, cache: Path) -> None:
    folder = shutil.copytree(SHAPES, tmp_path / "shapes", ignore=shutil.ignore_patterns("*.py", "__pycache__", ".packed"))

    model = load(EngineConfig(model=str(folder), threads=1, device="cpu", weights=weights, check_reference=True), lambda fraction: None)

    assert model.integrity.reference.outcome == "same", model.integrity.reference.detail


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


def test_layer_by_layer_computes_what_the_whole_network_does(tiny_checkpoint: Path) -> None:
    whole = transformers.Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    layered = LayeredNetwork(type(whole), tiny_checkpoint, torch.float32, "cpu").network
    ids = torch.arange(3, 40)[None]

    with torch.inference_mode():
        expected, found = (network(input_ids=ids, use_cache=False).logits for network in (whole, layered))

    assert torch.equal(found, expected)
    assert all(parameter.is_meta for parameter in layered.parameters()), "no layer keeps its weights"


def test_one_layer_at_a_time_has_weights(tiny_checkpoint: Path, monkeypatch) -> None:
    held, fill = [], LayeredNetwork._fill

    def fill_and_count(self, name, module, given) -> None:
        fill(self, name, module, given)
        held.append(sum(parameter.numel() for parameter in self.network.parameters() if not parameter.is_meta))

    monkeypatch.setattr(LayeredNetwork, "_fill", fill_and_count)
    layered = LayeredNetwork(transformers.Glm4vForConditionalGeneration, tiny_checkpoint, torch.float32, "cpu")
    with torch.inference_mode():
        layered.network(input_ids=torch.arange(3, 40)[None], use_cache=False)

    assert held and max(held) * (4 + 4) + reference.ACTIVATION_BYTES <= layered.needs_bytes


@pytest.mark.parametrize("wrong", [None, other_token])
def test_with_little_memory_it_is_compared_layer_by_layer(wrong, tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(reference, "NEEDS_BYTES", 2**60)
    if wrong:
        monkeypatch.setattr(Glm4vRunner, "answer_alone", wrong)

    found = loaded(tiny_checkpoint).integrity.reference

    assert found.outcome == ("differs" if wrong else "same"), found.detail
    assert "layer by layer" in found.detail if not wrong else "square" in found.detail


def test_a_checkpoint_with_other_names_is_told(tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(reference, "NEEDS_BYTES", 2**60)
    monkeypatch.setattr(reference, "_files_of_tensors", lambda folder: {})

    found = loaded(tiny_checkpoint).integrity.reference

    assert found.outcome == "off" and "the checkpoint has no model." in found.detail
