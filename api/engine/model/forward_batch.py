"""What one forward pass computes, as tensors. The runner builds it, the decoder and its operations read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMetadata:
    """Rows `start` to `end` of a forward batch that attend in the same way.

    Either one new token for each of several requests: `pages` [rows, pages] and `lengths` [rows], the number of tokens
    that a row sees. Or several tokens of one request: `pages` [pages], and `first` tokens before them. `mask` is added
    to the scores by operations that need it; None for rows that begin their request, where causal attention is enough.
    """

    start: int
    end: int
    pages: torch.Tensor  # int64 page numbers of the KV cache
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    first: int = 0

    @property
    def decode(self) -> bool:
        """Whether these are single new tokens of several requests."""
        return self.lengths is not None


@dataclass(frozen=True)
class ForwardBatch:
    """Tensors of one forward pass over `rows` tokens."""

    inputs: torch.Tensor  # [rows, hidden]: embeddings of tokens and images
    cos: torch.Tensor  # [rows, heads of q, k and v, head_dim]; values are rotated by the angle zero
    sin: torch.Tensor
    slot_mapping: torch.Tensor  # [rows] int64: the row of the KV cache that takes each token's key and value
    attention: tuple[AttentionMetadata, ...]
    logits_indices: torch.Tensor | None  # [n] int64: rows whose logits are computed; None: all
