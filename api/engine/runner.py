"""Every forward pass of a GLM-4.6V model: vision, prefill, decode.

Runs the unmodified transformers modules `glm4v` and `glm46v`. Positions are computed here for every
call: the module's own `rope_deltas` belongs to whoever prefilled last, so it is never used.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from api.engine.request import Picture, Sequence
from api.engine.sampling import Sampler

IMAGE_TYPE = 1  # in mm_token_type_ids; 0 is text
MERGE = 4  # patches that become one token


@dataclass
class _State:
    """What the runner keeps for one request between steps."""

    features: list[torch.Tensor] = field(default_factory=list)
    cache: DynamicCache | None = None
    position_delta: int = 0  # positions run behind the token count: a picture spans fewer of them
    sampler: Sampler | None = None


class Glm4vRunner:
    def __init__(self, model: PreTrainedModel) -> None:
        # transformers builds its signatures at run time, so the model's methods have no useful types.
        self._model: Any = model
        self._device = model.device
        self._image_token_id: int = model.config.image_token_id
        self._vocabulary_size: int = model.get_output_embeddings().out_features

    @torch.inference_mode()
    def encode_picture(self, sequence: Sequence) -> None:
        picture = sequence.request.pictures[sequence.pictures_encoded]
        state = self._state(sequence)
        state.features.append(self._encode(picture))

    @torch.inference_mode()
    def prefill(self, sequence: Sequence) -> int:
        request, state = sequence.request, self._state(sequence)
        ids = torch.tensor([request.prompt_ids], device=self._device)
        types = (ids == self._image_token_id).int() * IMAGE_TYPE
        grids = self._tensor([p.grid for p in request.pictures]) if request.pictures else None
        positions, delta = self._model.model.get_rope_index(ids, types, image_grid_thw=grids)
        state.position_delta = int(delta)
        state.cache = DynamicCache(config=self._model.config.get_text_config())
        state.sampler = Sampler(request.sampling, request.prompt_ids, self._vocabulary_size)
        vision: dict[str, Any] = {}
        if state.features:
            features: Any = tuple(state.features)  # one tensor for each picture, though declared as one
            vision["image"] = BaseModelOutputWithPooling(pooler_output=features)
        logits = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=state.cache,
            mm_encoder_outputs=vision,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        state.features.clear()
        return state.sampler.choose(logits[0, -1])

    @torch.inference_mode()
    def decode(self, sequences: Items[Sequence]) -> list[int]:
        return [self._decode_one(sequence) for sequence in sequences]

    def is_fatal(self, error: BaseException) -> bool:
        """After a CUDA error every later call fails too; running out of memory is not of that kind."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return False
        return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One picture and two tokens: the first request pays for no set-up, and a broken model shows now."""
        patches = torch.zeros(MERGE * 4, self._patch_size())
        self._encode(Picture(patches=patches, grid=(1, 4, 4), tokens=4))
        cache = DynamicCache(config=self._model.config.get_text_config())
        for place in range(2):
            position = torch.full((3, 1, 1), place, device=self._device)
            self._model(input_ids=self._tensor([[0]]), position_ids=position, past_key_values=cache, use_cache=True)

    def _decode_one(self, sequence: Sequence) -> int:
        state = self._state(sequence)
        assert state.cache is not None and state.sampler is not None
        place = state.cache.get_seq_length() + state.position_delta
        logits = self._model(
            input_ids=self._tensor([[sequence.output_ids[-1]]]),
            position_ids=torch.full((3, 1, 1), place, device=self._device),
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return state.sampler.choose(logits[0, -1])

    def _encode(self, picture: Picture) -> torch.Tensor:
        patches = torch.as_tensor(picture.patches).to(self._device)
        output = self._model.model.get_image_features(patches, self._tensor([picture.grid]), return_dict=True)
        return output.pooler_output[0]

    def _patch_size(self) -> int:
        vision = self._model.config.vision_config
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self._device)

    @staticmethod
    def _state(sequence: Sequence) -> _State:
        if sequence.state is None:
            sequence.state = _State()
        return sequence.state
