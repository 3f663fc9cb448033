"""A fingerprint of a model: a digest of each stage of one fixed question about one fixed picture.

The picture and the prompt are made of integers, the shapes never change, and the engine thread computes with its own
number of threads, so the same weights and software give the same bits each time.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import torch

from api.engine.model.runner import Glm4vRunner
from api.engine.request import ImageInput, Request, SamplingParams
from api.engine.sequence import Sequence, make_sequence

SIDE = 8  # of the picture, in patches
TEXT_TOKENS = 24  # before the picture, and as many after it


class _Interrupted(Exception):
    pass


def fingerprint(runner: Glm4vRunner, image_token_id: int, interrupted: Callable[[], bool]) -> dict[str, str] | None:
    """Digests by stage, in the order of computation: `vision`, `layer-0`, `layer-middle`, `layer-last`, `logits`. None if
    `interrupted` became true between two layers."""
    layers = runner.decoder.layers
    names = {0: "layer-0", layers // 2: "layer-middle", layers - 1: "layer-last"}
    digests: dict[str, str] = {}

    def observe(number: int, x: torch.Tensor, normed: torch.Tensor) -> None:
        if number in names:
            digests[names[number]] = _digest(x)
        if interrupted():
            raise _Interrupted

    sequence = _question(runner, image_token_id)
    try:
        logits = runner.answer_alone(sequence, observe)
    except _Interrupted:
        return None
    vision = {"vision": _digest(next(iter(sequence.features.values())))}
    return vision | digests | {"logits": _digest(logits)}


def _question(runner: Glm4vRunner, image_token_id: int) -> Sequence:
    encoder, words = runner.vision_encoder, runner.decoder.vocabulary_size
    count = SIDE * SIDE * encoder.patch_size
    # Multiples of a prime, spread over -1 to 1 as the pixels of a picture are.
    patches = (np.arange(count) * 7919 % 2003).astype(np.float32).reshape(SIDE * SIDE, -1) / 1001 - 1
    tokens = SIDE * SIDE // encoder.merge**2
    image = ImageInput(patches=patches, grid=(1, SIDE, SIDE), tokens=tokens, key=b"fingerprint")
    text = [number * 7919 % words for number in range(1, 2 * TEXT_TOKENS + 1)]
    text = [token if token != image_token_id else token - 1 for token in text]
    ids = (*text[:TEXT_TOKENS], *[image_token_id] * tokens, *text[TEXT_TOKENS:])
    request = Request("fingerprint", ids, SamplingParams(max_tokens=1), (image,))
    return make_sequence(request, lambda event: None, image_token_id)


def _digest(tensor: torch.Tensor) -> str:
    memory = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return blake2b(memory.tobytes(), digest_size=8).hexdigest()
