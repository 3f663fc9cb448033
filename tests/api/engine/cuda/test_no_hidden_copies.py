"""A whole answer on a CUDA device that has no numbers: every step copies once there and once back, and waits for nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import RaggedOperations
from fake_card import PLACE, FakeDevice, FakeSource, HiddenCopy, fake_card
from prompts import Steps

from api.engine.cuda.runner import CudaRunner
from api.engine.image_processor import PixelPatches
from api.engine.loaded_model import Model
from api.engine.request import ImageInput, Request, SamplingParams


class OnCard(RaggedOperations):
    """Without a search that these tensors do not know."""


@pytest.fixture(scope="module")
def card(plain: Model, tiny_checkpoint) -> Model:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    with torch.device("meta"):
        network = Glm4vForConditionalGeneration(Glm4vConfig.from_pretrained(tiny_checkpoint))
    with fake_card(strict=False):
        source = FakeSource(network, torch.bfloat16)
        runner = CudaRunner(source, plain.capacity, plain.context_tokens, OnCard(plain.capacity.page_tokens), FakeDevice())
        # Resizing learned positions is `grid_sample`, which has no shapes for such a device; once for each size of image.
        tower = runner.vision_encoder
        learned = torch.empty(64, network.config.vision_config.hidden_size, dtype=torch.bfloat16, device=PLACE)
        angles = torch.empty(64, network.config.vision_config.hidden_size // 2, device=PLACE)
        tower._tables[1, 8, 8] = (learned, angles, angles)
        tower._tables[1, 4, 4] = (learned[:16], angles[:16], angles[:16])
    return replace(plain, runner=runner)


def image(side: int, as_bytes: bool = False) -> ImageInput:
    patches = np.zeros((side * side, 1176), np.float32)
    if as_bytes:
        patches = PixelPatches(np.zeros((side * side, 3, 196), np.uint8), np.zeros((3, 256), np.float32), 2)
    return ImageInput(patches, (1, side, side), side * side // 4, b"")


@pytest.mark.parametrize("recorded", [False, True], ids=["operations", "graphs"])
def test_a_step_copies_once_there_and_once_back(card: Model, recorded: bool) -> None:
    device = card.runner._queue
    image_id = card.vocabulary.special[card.image_token]
    requests = [
        Request("text", tuple(range(40)), SamplingParams(20)),
        Request("sampled", tuple(range(5)), SamplingParams(20, temperature=0.8, top_k=2, top_p=0.6)),
        Request(
            "penalised", tuple(range(7)),
            SamplingParams(20, temperature=0.8, top_k=2, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.2),
        ),
        Request("image", (1, *[image_id] * 16, 2), SamplingParams(20), (image(8),)),
        Request(
            "images", (1, *[image_id] * 4, 2, *[image_id] * 16, 2), SamplingParams(20), (image(4, True), image(8, True))
        ),
    ]
    with fake_card():
        while recorded and card.runner.prepare_next():
            pass
        assert not recorded or (card.runner.graphs.off is None and card.runner.graphs.complete)
        steps = Steps(card, chunk_tokens=23)
        sequences = [steps.add(request) for request in requests]
        for _ in range(16):
            before = (device.uploads, device.downloads)
            steps.step()
            batch_downloads = device.downloads - before[1]
            assert device.uploads - before[0] <= 1 and batch_downloads <= 1
    assert all(len(sequence.output_ids) > 8 for sequence in sequences)
    assert device.sent >= 1


@pytest.mark.parametrize(
    "work",
    [
        lambda there: there.select(0, 0).item(), lambda there: there.tolist(), lambda there: there.cpu(),
        lambda there: there[[0, 1]], lambda there: there.copy_(torch.zeros(4)), lambda there: torch.zeros(4).to(PLACE),
        lambda there: there.__setitem__(0, 1.0), lambda there: bool(there.sum()),
    ],
)  # fmt: skip
def test_a_hidden_copy_is_found(work) -> None:
    with fake_card(), pytest.raises(HiddenCopy):
        work(torch.empty(4, device=PLACE))
