"""The compiled operations against torch's, at the limits of their tiles, panels, pages and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from api.engine.kernels import build
from api.engine.kernels.operations import CompiledOperations, PackedLinear
from api.engine.model.linear import TorchLinear
from api.engine.model.operations import AttentionMetadata, TorchOperations

PAGE = build.PAGE_TOKENS
THEIRS = TorchOperations(PAGE)
EPS = 1e-5


@pytest.fixture(scope="module")
def ours() -> CompiledOperations:
    torch.ops.load_library(str(build.try_library(build.compile_library(build.cache_folder()))))
    return CompiledOperations()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Rows must be divided between threads without gaps or overlaps."""
    torch.manual_seed(46)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal except for the last two of 8 bits: both round between two steps."""
    return bool(torch.allclose(ours.float(), theirs.float(), rtol=2**-6, atol=2**-7))


# One element, no whole register, rows of one thread and one more than a thread takes.
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 33), (4, 192), (130, 1024)])
def test_add_norm(rows: int, size: int, ours: CompiledOperations) -> None:
    x, delta, delta_norm, next_norm = random(rows, size), random(rows, size), random(size), random(size)

    for mine, expected in zip(
        ours.add_norm(x, delta, delta_norm, next_norm, EPS),
        THEIRS.add_norm(x, delta, delta_norm, next_norm, EPS),
        strict=True,
    ):
        assert close(mine, expected)


# Every number of rows in a tile, several tiles, as many rows as are packed at once and one more; inputs of one panel's
# depth and more.
@pytest.mark.parametrize(
    ("features", "inputs", "rows"),
    [
        *((96, 1176, rows) for rows in range(1, 14)),
        (96, 1176, 24), (96, 1176, 25), (96, 1176, 512), (96, 1176, 513),
        (32, 2, 1), (64, 8192, 5), (64, 8194, 13), (64, 9000, 530),
    ],
)  # fmt: skip
def test_products(features: int, inputs: int, rows: int, ours: CompiledOperations) -> None:
    weight, x = (random(features, inputs).float() / inputs**0.5).bfloat16(), random(rows, inputs)
    for bias, gated in ((None, False), (random(features), False), (None, True)):
        assert close(PackedLinear(weight, bias, gated)(x), TorchLinear(weight, bias, gated)(x))


def test_a_product_that_does_not_fit_the_panels_stays_with_torch(ours: CompiledOperations) -> None:
    x = random(3, 64)
    for weight in (random(40, 64), random(32, 63)):
        linear = ours.linear(weight)

        assert isinstance(linear, TorchLinear)
        assert linear(x[:, : linear.in_features].contiguous()).shape == (3, linear.out_features)


@pytest.mark.parametrize(("dim", "rows"), [(16, 1), (80, 3), (128, 4), (144, 5), (256, 40)])
def test_rotate_store(dim: int, rows: int, ours: CompiledOperations) -> None:
    heads, kv_heads = 6, 2
    qkv, kv = random(rows, heads + 2 * kv_heads, dim), random(4 * PAGE, 2 * kv_heads, dim)
    angles = torch.rand(rows, 1, dim) * 6
    cos, sin = (t.to(torch.bfloat16).repeat(1, heads + 2 * kv_heads, 1) for t in (angles.cos(), angles.sin()))
    cos[:, -kv_heads:], sin[:, -kv_heads:] = 1, 0
    slot_mapping = torch.randperm(len(kv))[:rows]
    expected_kv = kv.clone()
    expected = THEIRS.rotate_store(qkv, cos, sin, expected_kv, slot_mapping)

    rotated = ours.rotate_store(qkv, cos, sin, kv, slot_mapping)

    assert close(rotated, expected)
    assert close(kv, expected_kv)
    untouched = torch.ones(len(kv), dtype=torch.bool).index_fill(0, slot_mapping, False)
    assert torch.equal(kv[untouched], expected_kv[untouched])


# Heads of half a panel, whole panels and one and a half; lengths around a page and a panel; more query heads that share
# a key head than a tile has rows.
@pytest.mark.parametrize(
    ("dim", "kv_heads", "shared", "lengths"),
    [
        (16, 1, 1, [1]),
        (32, 2, 3, [16, 17, 31, 32]),
        (48, 1, 12, [33, 64]),
        (64, 1, 13, [32, 33, 200]),
        (80, 2, 8, [200, 3, 144, 33, 1, 90, 16, 15, 48]),
        (128, 2, 3, [200, 3, 144, 33, 1, 90, 16, 15, 48]),
        (144, 2, 8, [1, 15, 16, 48]),
        (256, 1, 5, [33]),
    ],
)
def test_attend_decode(dim: int, kv_heads: int, shared: int, lengths: list[int], ours: CompiledOperations) -> None:
    held = -(-max(lengths) // PAGE)
    kv = random(64 * PAGE, 2 * kv_heads, dim)
    pages = torch.stack([torch.randperm(64)[:held] for _ in lengths])
    beyond = torch.where(torch.arange(held * PAGE) < torch.tensor(lengths)[:, None], 0.0, -torch.inf)
    mask = beyond.to(torch.bfloat16)[:, None, None]
    metadata = AttentionMetadata(0, len(lengths), pages, mask, torch.tensor(lengths))
    qkv = random(len(lengths), kv_heads * (shared + 2), dim) * 2

    result = ours.attend_decode(qkv, kv, metadata)

    exact = replace(metadata, mask=mask.float())
    assert close(result, THEIRS.attend_decode(qkv.float(), kv.float(), exact))


# Prompts from their beginning and from within a page; as many queries of a head as a thread takes, and one more.
@pytest.mark.parametrize(
    ("dim", "kv_heads", "shared", "rows", "first"),
    [
        (16, 1, 1, 1, 0),
        (32, 2, 3, 20, 0),
        (64, 1, 1, 240, 0),
        (64, 1, 1, 241, 0),
        (64, 2, 16, 15, 1),
        (64, 2, 16, 16, 0),
        (80, 2, 3, 20, 13),
        (128, 2, 16, 20, 30),
        (144, 1, 5, 13, 3),
        (256, 2, 3, 75, 100),
    ],
)
def test_attend_prefill(
    dim: int, kv_heads: int, shared: int, rows: int, first: int, ours: CompiledOperations
) -> None:
    held = -(-(first + rows) // PAGE)
    kv, qkv = random(16 * PAGE, 2 * kv_heads, dim), random(rows, kv_heads * (shared + 2), dim)
    pages, seen = torch.randperm(16)[:held], torch.arange(first + 1, first + rows + 1)
    later = torch.where(torch.arange(held * PAGE) < seen[:, None], 0.0, -torch.inf).to(torch.bfloat16)
    slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[first : first + rows]
    kv[slots] = qkv[:, -2 * kv_heads :]  # as after rotate_store
    metadata = AttentionMetadata(0, rows, pages, later if first else None, first=first)

    result = ours.attend_prefill(qkv, kv, metadata)

    exact = replace(metadata, mask=None if metadata.mask is None else metadata.mask.float())
    assert close(result, THEIRS.attend_prefill(qkv.float(), kv.float(), exact))


@pytest.mark.parametrize(
    ("heads", "dim", "frames", "patches"),
    [(1, 16, 1, 4), (3, 64, 1, 256), (2, 80, 2, 36), (2, 128, 3, 100), (1, 64, 1, 240), (1, 64, 1, 241)],
)
def test_attend_image(heads: int, dim: int, frames: int, patches: int, ours: CompiledOperations) -> None:
    qkv, angles = random(frames * patches, 3 * heads * dim), torch.rand(frames * patches, dim) * 6

    result = ours.attend_image(qkv, angles.cos(), angles.sin(), frames, heads)

    assert close(result, THEIRS.attend_image(qkv.float(), angles.cos(), angles.sin(), frames, heads))


def test_tokens_beyond_a_length_are_never_read(ours: CompiledOperations) -> None:
    kv = random(2 * PAGE, 2, 64)
    kv[20:] = torch.inf
    qkv = random(1, 3, 64)
    decode = AttentionMetadata(0, 1, torch.tensor([[0, 1]]), None, torch.tensor([20]))
    prefill = AttentionMetadata(0, 1, torch.tensor([0, 1]), None, first=19)

    for result in (ours.attend_decode(qkv, kv, decode), ours.attend_prefill(qkv, kv, prefill)):
        assert result.isfinite().all() and result.abs().max() < 10


QKV, KV = random(2, 3, 64), random(2 * PAGE, 2, 64)  # one query head, one key head
PAGES, LENGTHS = torch.tensor([[0, 1], [1, 0]]), torch.tensor([20, 32])
COS = random(2, 3, 64)
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "a page beyond the cache": ("attend_decode", (QKV, KV, PAGES + 1, LENGTHS), "pages must be >= 0 and < 2"),
    "a negative page": ("attend_prefill", (QKV, KV, torch.tensor([-1]), 0), "pages must be >= 0"),
    "a length beyond its pages": ("attend_decode", (QKV, KV, PAGES, LENGTHS + 1), "lengths must be >= 1 and < 33"),
    "no length at all": ("attend_decode", (QKV, KV, PAGES, LENGTHS * 0), "lengths must be >= 1"),
    "a prompt beyond its pages": ("attend_prefill", (QKV, KV, torch.tensor([1]), 15), "15 \\+ 2 tokens in 1 pages"),
    "a slot beyond the cache": ("rotate_store", (QKV, COS, COS, KV, torch.tensor([0, 32])), "slot_mapping must be"),
    "another shape of cos": ("rotate_store", (QKV, COS[:, :1].contiguous(), COS, KV, torch.tensor([0, 1])), "cos and sin"),
    "another type": ("attend_decode", (QKV.float(), KV, PAGES, LENGTHS), "qkv must be a contiguous CPU tensor of BFloat16"),
    "not contiguous": ("product", (random(64, 2).T, torch.zeros(1, 32, 32, 2).bfloat16(), None), "not contiguous"),
    "weights of other inputs": ("product", (random(2, 62), torch.zeros(1, 32, 32, 2).bfloat16(), None), "does not fit"),
    "frames of unequal size": ("attend_image", (random(5, 48), torch.ones(5, 16), torch.ones(5, 16), 2, 1), "does not fit"),
    "a norm of another size": ("add_norm", (random(2, 8), random(2, 8), random(8), random(7), EPS), "dimension 0"),
}


@pytest.mark.parametrize(("operation", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused(
    operation: str, arguments: tuple[Any, ...], message: str, ours: CompiledOperations
) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.glm, operation)(*arguments)
