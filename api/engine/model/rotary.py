"""Multimodal rotary embedding (M-RoPE): the positions of a prompt's tokens, and cos and sin of a position.

A text token advances all three axes (time, height, width) by one. The tokens of an image share one time, spread over
height and width, and advance the axes by the longer side only; so positions lag behind the token count by a constant of
the sequence. Sources: get_rope_index, Glm4vTextRotaryEmbedding and apply_rotary_pos_emb in
transformers.models.glm4v.modeling_glm4v (5.23).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch

from api.engine.sequence import ImageSpan

DEFAULT_SECTIONS = (8, 12, 12)  # frequencies for time, height and width, where the config names none


def rope_positions(length: int, spans: Items[ImageSpan], merge: int) -> tuple[np.ndarray, int]:
    """Positions [3, length] of a prompt, and the difference between the position and the index of later tokens.

    `merge` is the number of patches along the side of one image token.
    """
    positions = np.empty((3, length), dtype=np.int64)
    index = current = 0
    for span in spans:
        current = _advance_text(positions, index, span.start, current)
        frames, rows, columns = span.image.grid
        rows, columns = rows // merge, columns // merge
        time, height, width = np.indices((frames, rows, columns)).reshape(3, -1)
        positions[:, span.start : span.end] = np.stack([time, height, width]) + current
        current += max(rows, columns)
        index = span.end
    _advance_text(positions, index, length, current)
    return positions, int(positions.max(initial=-1)) + 1 - length


def _advance_text(positions: np.ndarray, start: int, end: int, current: int) -> int:
    positions[:, start:end] = np.arange(current, current + end - start)
    return current + end - start


class Rotary:
    """cos and sin tables for heads whose dimensions are permuted to half-split form, see `half_split_order`.

    The transformers module rotates neighbouring dimensions (0 with 1, 2 with 3 ...) of the first part of a head and
    leaves the rest unchanged. Here dimension i rotates with i + half over the whole head, and the rest rotates by the
    angle zero. Queries and keys are permuted alike, so their products are the same, and no strided access is needed.
    """

    def __init__(
        self,
        inverse_frequencies: torch.Tensor,  # [rotated / 2]
        sections: Items[int],  # numbers of frequencies for time, height, width
        head_dim: int,
        positions: int,
        dtype: torch.dtype,
        scaling: float = 1.0,
    ) -> None:
        device = inverse_frequencies.device
        rotated, half = 2 * len(inverse_frequencies), head_dim // 2
        angles = torch.arange(positions, device=device).float()[:, None] * inverse_frequencies.float()
        cos = torch.ones(positions, half, device=device)
        sin = torch.zeros(positions, half, device=device)
        cos[:, : rotated // 2] = angles.cos() * scaling
        sin[:, : rotated // 2] = angles.sin() * scaling
        self._cos = torch.cat([cos, cos], dim=-1).to(dtype)  # [positions, head_dim]
        self._sin = torch.cat([-sin, sin], dim=-1).to(dtype)
        axes = [number % 3 for number, size in enumerate(sections) for _ in range(size)]
        axes += [0] * (half - rotated // 2)
        self._axes = torch.tensor(axes * 2, device=device)  # [head_dim]
        self._dims = torch.arange(head_dim, device=device)

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [positions, head_dim] of tokens whose three positions are equal."""
        return self._cos, self._sin

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [tokens, head_dim] for int64 positions [3, tokens]."""
        rows = positions[self._axes].T
        return self._cos[rows, self._dims], self._sin[rows, self._dims]

    def at_text(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for tokens whose three positions are equal: positions [tokens]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def head_dim_of(config: Any) -> int:
    """From the config of a text model where it stands there: GLM-OCR's is not hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def inverse_frequencies(config: Any, head_dim: int) -> torch.Tensor:
    """Frequencies [rotated / 2] of a text model, as Glm4vTextRotaryEmbedding computes them. Raises ValueError."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type must be default. Given: {rope['rope_type']}")
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return 1.0 / (rope["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float) / rotated))


def half_split_order(head_dim: int, rotated: int) -> list[int]:
    """The permutation to half-split form: for each of its dimensions, the dimension in the checkpoint's form."""
    rest = (head_dim - rotated) // 2
    first = [*range(0, rotated, 2), *range(rotated, rotated + rest)]
    second = [*range(1, rotated, 2), *range(rotated + rest, head_dim)]
    return first + second


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [..., head_dim]; `sin` carries the sign of the swapped half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
