"""The tiny checkpoint with the plain runner, and with that of a CUDA device on a device that replays on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from replay import ReplayDevice

from api.engine.config import EngineConfig
from api.engine.cuda.runner import CudaRunner
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.model.operations import TorchOperations
from api.engine.model.weight_source import NetworkSource

SLOTS = 6


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Model:
    return load(EngineConfig(model=str(tiny_checkpoint), threads=1, device="cpu", slots=SLOTS), lambda fraction: None)


@pytest.fixture(scope="module")
def replayed(tiny_checkpoint: Path, plain: Model) -> Model:
    from transformers import Glm4vForConditionalGeneration

    network = Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    operations = TorchOperations(plain.capacity.page_tokens)
    runner = CudaRunner(NetworkSource(network), plain.capacity, plain.context_tokens, operations, ReplayDevice())
    runner.warm_up()
    while runner.prepare_next():
        pass
    return replace(plain, runner=runner)
