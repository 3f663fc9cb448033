"""The tiny checkpoint with the plain runner, and with that of a CUDA device on a device that replays on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from network_source import NetworkSource
from replay import ReplayDevice

from api.engine.config import EngineConfig
from api.engine.cuda.runner import CudaRunner
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.model.operations import AttentionMetadata, TorchOperations
from api.engine.model.sampler import penalise_counts, penalise_seen

SLOTS = 6


class RaggedOperations(TorchOperations):
    """Chunks of several sequences in one call, as kernels compute them: each row by itself, by what is on the device. And
    penalties in place."""

    ragged = True

    @staticmethod
    def penalise(
        logits: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor, *penalties: torch.Tensor
    ) -> None:
        repetition, presence, frequency = (penalty[:, None] for penalty in penalties)
        lowered = penalise_seen(logits, seen.index_select(0, slots), repetition)
        logits.copy_(penalise_counts(lowered, counts.index_select(0, slots), presence, frequency))

    def attend_prefill(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        if metadata.starts is None or metadata.firsts is None:
            return super().attend_prefill(qkv, kv, metadata)
        rows = torch.arange(len(qkv), device=qkv.device)
        owner = torch.searchsorted(metadata.starts[1:].contiguous(), rows.int(), right=True)
        owner = owner.clamp(max=len(metadata.firsts) - 1)
        lengths = metadata.firsts[owner] + rows - metadata.starts[owner] + 1
        tables = metadata.pages.index_select(0, owner)
        return self.attend_decode(qkv, kv, AttentionMetadata(0, len(qkv), tables, None, lengths))


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Model:
    config = EngineConfig(
        model=str(tiny_checkpoint), threads=1, device="cpu", slots=SLOTS, encoder_cache_bytes=2**26
    )
    return load(config, lambda fraction: None)


@pytest.fixture(scope="module")
def replayed(tiny_checkpoint: Path, plain: Model) -> Model:
    from transformers import Glm4vForConditionalGeneration

    network = Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    operations = RaggedOperations(plain.capacity.page_tokens)
    runner = CudaRunner(NetworkSource(network), plain.capacity, plain.context_tokens, operations, ReplayDevice())
    runner.warm_up()
    while runner.prepare_next():
        pass
    return replace(plain, runner=runner)
