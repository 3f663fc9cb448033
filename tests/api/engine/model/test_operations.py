"""The bfloat16 attention by products against exact attention, in one block and in several."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from api.engine.model import operations

ROWS, KEYS, EARLIER = 37, 50, 13


@pytest.fixture(params=[2**23, 5 * 6 * KEYS], ids=["one block", "blocks of five rows"])
def most_scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(operations, "MAX_SCORES", request.param)
    return request.param


def tensors(rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[2 groups, 3 heads that share a key head, rows, 16] and two [2, keys, 16] in bfloat16."""
    random = torch.Generator().manual_seed(1)
    shapes = ((2, 3, rows, 16), (2, keys, 16), (2, keys, 16))
    q, k, v = (torch.randn(shape, generator=random).bfloat16() for shape in shapes)
    return q, k, v


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double()[:, None], v.double()[:, None]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return F.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v


def test_without_a_mask_every_key_is_attended_to(most_scores: int) -> None:
    q, k, v = tensors(ROWS, KEYS)

    found = operations._attend_by_products(q, k, v, None, causal=False)

    torch.testing.assert_close(found.double(), exact(q, k, v, torch.zeros(ROWS, KEYS).bool()), atol=0.02, rtol=0)


def test_causal_rows_do_not_attend_to_later_keys(most_scores: int) -> None:
    q, k, v = tensors(ROWS, ROWS)
    later = torch.ones(ROWS, ROWS).triu(1).bool()

    found = operations._attend_by_products(q, k, v, None, causal=True)

    torch.testing.assert_close(found.double(), exact(q, k, v, later), atol=0.02, rtol=0)


def test_masked_keys_are_not_attended_to(most_scores: int) -> None:
    q, k, v = tensors(ROWS, KEYS)
    later = torch.arange(KEYS) > torch.arange(EARLIER, EARLIER + ROWS)[:, None]
    mask = torch.zeros(ROWS, KEYS).masked_fill(later, -torch.inf).bfloat16()

    found = operations._attend_by_products(q, k, v, mask, causal=False)

    torch.testing.assert_close(found.double(), exact(q, k, v, later), atol=0.02, rtol=0)


def test_float32_goes_through_the_fused_kernel() -> None:
    assert not operations.has_fast_products(torch.device("cpu"), torch.float32)
    q, k, v = (t.float() for t in tensors(ROWS, ROWS))
    later = torch.ones(ROWS, ROWS).triu(1).bool()

    found = operations.attend(q, k, v, causal=True)

    torch.testing.assert_close(found.double(), exact(q, k, v, later), atol=1e-5, rtol=0)
