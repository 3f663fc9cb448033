"""The compiled operations against torch's, and what happens where they cannot be had."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from api.engine.kernels import build as kernels
from api.engine.kernels.build import CompiledOperations
from api.engine.loading.placement import Selection
from api.engine.model.linear import Linear
from api.engine.model.operations import AttentionMetadata, Operations, TorchOperations

PAGE = kernels.PAGE_TOKENS
THEIRS = TorchOperations(PAGE)
EPS = 1e-5
COMPILE_S = 180.0


@pytest.fixture(scope="module")
def ours() -> Operations:
    torch.ops.load_library(str(kernels.compiled(kernels.cache_folder())))
    return CompiledOperations()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Rows must be shared out without a gap or an overlap."""
    torch.manual_seed(46)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for the last two of 8 bits: torch rounds between two steps, and so do these."""
    return bool(torch.allclose(ours.float(), theirs.float(), rtol=2**-6, atol=2**-7))


@pytest.mark.parametrize("size", [1, 33, 192, 1024])
@pytest.mark.parametrize("rows", [1, 3, 4, 130])
def test_add_norm(rows: int, size: int, ours: Operations) -> None:
    x, part, after, before = some(rows, size), some(rows, size), some(size), some(size)

    for mine, wanted in zip(
        ours.add_norm(x, part, after, before, EPS), THEIRS.add_norm(x, part, after, before, EPS), strict=True
    ):
        assert close(mine, wanted)


# Tiles of 12 rows and what is left of them, more rows than are taken at once, more inputs than are.
@pytest.mark.parametrize("rows", [*range(1, 14), 24, 31, 530])
@pytest.mark.parametrize(("features", "inputs"), [(32, 2), (96, 1176), (64, 9000)])
def test_products(features: int, inputs: int, rows: int, ours: Operations) -> None:
    weight, x = (some(features, inputs).float() / inputs**0.5).bfloat16(), some(rows, inputs)
    for bias, gated in ((None, False), (some(features), False), (None, True)):
        linear = Linear(weight, bias, gated)
        wanted = linear(x)

        linear.pack()

        assert linear.panels is not None and linear._weight is None
        assert close(linear(x), wanted)


def test_a_product_that_does_not_fit_the_panels_stays_as_it_is(ours: Operations) -> None:
    x = some(3, 64)
    for linear in (Linear(some(40, 64)), Linear(some(32, 63))):
        linear.pack()

        assert linear.panels is None
        assert linear(x[:, : linear.in_features].contiguous()).shape == (3, linear.out_features)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_rotate_store(dim: int, rows: int, ours: Operations) -> None:
    heads, kv_heads = 6, 2
    qkv, kv = some(rows, heads + 2 * kv_heads, dim), some(4 * PAGE, 2 * kv_heads, dim)
    angles = torch.rand(rows, 1, dim) * 6
    cos, sin = (turn.to(torch.bfloat16).repeat(1, heads + 2 * kv_heads, 1) for turn in (angles.cos(), angles.sin()))
    cos[:, -kv_heads:], sin[:, -kv_heads:] = 1, 0
    places = torch.randperm(len(kv))[:rows]
    wanted_kv = kv.clone()
    wanted = THEIRS.rotate_store(qkv, cos, sin, wanted_kv, places)

    turned = ours.rotate_store(qkv, cos, sin, kv, places)

    assert close(turned, wanted)
    assert close(kv, wanted_kv)
    untouched = torch.ones(len(kv), dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(kv[untouched], wanted_kv[untouched])


@pytest.mark.parametrize("lengths", [[1], [16, 17, 31, 32], [200, 3, 144, 33, 1, 90, 16, 15, 48]], ids=len)
@pytest.mark.parametrize(("kv_heads", "shared"), [(1, 1), (2, 3), (2, 8), (1, 5)])
@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_attend_single(dim: int, kv_heads: int, shared: int, lengths: list[int], ours: Operations) -> None:
    held = -(-max(lengths) // PAGE)
    kv = some(64 * PAGE, 2 * kv_heads, dim)
    pages = torch.stack([torch.randperm(64)[:held] for _ in lengths])
    hidden = torch.where(torch.arange(held * PAGE) < torch.tensor(lengths)[:, None], 0.0, -torch.inf)
    mask = hidden.to(torch.bfloat16)[:, None, None]
    group = AttentionMetadata(0, len(lengths), pages, mask, torch.tensor(lengths))
    qkv = some(len(lengths), kv_heads * (shared + 2), dim) * 2

    found = ours.attend_single(qkv, kv, group)

    exact = replace(group, mask=mask.float())
    assert close(found, THEIRS.attend_single(qkv.float(), kv.float(), exact))


@pytest.mark.parametrize(("rows", "first"), [(1, 0), (20, 0), (20, 30), (75, 100)])
@pytest.mark.parametrize(("kv_heads", "shared"), [(1, 1), (2, 3), (2, 16)])
@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_attend_chunk(dim: int, kv_heads: int, shared: int, rows: int, first: int, ours: Operations) -> None:
    held = -(-(first + rows) // PAGE)
    kv, qkv = some(16 * PAGE, 2 * kv_heads, dim), some(rows, kv_heads * (shared + 2), dim)
    pages, seen = torch.randperm(16)[:held], torch.arange(first + 1, first + rows + 1)
    later = torch.where(torch.arange(held * PAGE) < seen[:, None], 0.0, -torch.inf).to(torch.bfloat16)
    places = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[first : first + rows]
    kv[places] = qkv[:, -2 * kv_heads :]  # as they are once rotate_store has been there
    group = AttentionMetadata(0, rows, pages, later if first else None, first=first)

    found = ours.attend_chunk(qkv, kv, group)

    exact = replace(group, mask=None if group.mask is None else group.mask.float())
    assert close(found, THEIRS.attend_chunk(qkv.float(), kv.float(), exact))


@pytest.mark.parametrize(("frames", "patches"), [(1, 4), (1, 256), (2, 36), (3, 100)])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 64), (2, 80), (2, 128)])
def test_attend_picture(heads: int, dim: int, frames: int, patches: int, ours: Operations) -> None:
    qkv, angles = some(frames * patches, 3 * heads * dim), torch.rand(frames * patches, dim) * 6
    turns = angles.cos(), angles.sin()

    found = ours.attend_image(qkv, *turns, frames, heads)

    assert close(found, THEIRS.attend_image(qkv.float(), *turns, frames, heads))


def test_what_lies_beyond_a_length_is_never_seen(ours: Operations) -> None:
    kv = some(2 * PAGE, 2, 64)
    kv[20:] = torch.inf
    qkv = some(1, 3, 64)
    single = AttentionMetadata(0, 1, torch.tensor([[0, 1]]), None, torch.tensor([20]))
    chunk = AttentionMetadata(0, 1, torch.tensor([0, 1]), None, first=19)

    for found in (ours.attend_single(qkv, kv, single), ours.attend_chunk(qkv, kv, chunk)):
        assert found.isfinite().all() and found.abs().max() < 10


def test_they_fit_bfloat16_on_a_cpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    assert kernels.obstacle(cpu, torch.bfloat16, 16, (128, 80)) is None
    assert "float32" in str(kernels.obstacle(cpu, torch.float32, 16, (128, 64)))
    assert "CPU" in str(kernels.obstacle(torch.device("cuda"), torch.bfloat16, 16, (128, 64)))
    assert "88" in str(kernels.obstacle(cpu, torch.bfloat16, 16, (128, 88)))
    assert "32" in str(kernels.obstacle(cpu, torch.bfloat16, 32, (64, 64)))
    monkeypatch.setattr(kernels, "_processor", lambda: "avx2 avx512f")
    assert "AVX512_BF16" in str(kernels.obstacle(cpu, torch.bfloat16, 16, (128, 64)))


def test_where_the_processor_has_amx_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_processor", lambda: "avx512f avx512_bf16")
    assert kernels.multiplies()
    monkeypatch.setattr(kernels, "_processor", lambda: "avx512_bf16 amx_tile amx_bf16")
    assert not kernels.multiplies()


def test_they_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kernels.compiled(tmp_path)
    monkeypatch.setattr(kernels, "_run", lambda command: pytest.fail("compiled again"))

    assert kernels.compiled(tmp_path) == first
    assert [file.name for file in tmp_path.iterdir()] == [first.name]


def test_without_a_compiler_torch_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    told, used = prepared(tmp_path)

    assert [choice.value for choice in told] == ["compiling", "torch"]
    assert "no C++ compiler" in told[-1].reason and "g++" in told[-1].reason
    assert used == []


def test_a_compiler_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++broken"
    broken.write_text("#!/bin/sh\necho 'warning: first' >&2\necho 'error: No space left on device' >&2\nexit 4\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))

    told, used = prepared(tmp_path / "cache")

    assert told[-1].value == "torch" and used == []
    assert all(word in told[-1].reason for word in ("c++broken", "code 4", "No space left on device"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_library_that_computes_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(CompiledOperations):
        def attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: AttentionMetadata) -> torch.Tensor:
            return super().attend_single(qkv, kv, group) * 1.5

    monkeypatch.setattr(kernels, "CompiledOperations", Wrong)

    told, used = prepared(kernels.cache_folder())

    assert told[-1].value == "torch" and "attend_single" in told[-1].reason
    assert used == []


def test_a_file_that_is_no_library_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernels.so"
    library.write_text("cut off")
    monkeypatch.setattr(kernels, "compiled", lambda folder: library)

    told, used = prepared(tmp_path)

    assert told[-1].value == "torch" and "kernels.so" in told[-1].reason
    assert used == []


def test_compiled_ones_are_used_and_said(tmp_path: Path) -> None:
    told, used = prepared(kernels.cache_folder())

    assert [choice.value for choice in told] == ["compiling", "compiled"]
    assert isinstance(used[0], CompiledOperations) and len(used) == 1


def test_without_memory_for_the_weights_torch_goes_on() -> None:
    def use(operations: Operations) -> None:
        raise RuntimeError("there is no memory for 4096 bytes of weights")

    told, _ = prepared(kernels.cache_folder(), use)

    assert told[-1].value == "torch" and "no memory" in told[-1].reason


def prepared(folder: Path, use: Callable[[Operations], None] | None = None) -> tuple[list[Selection], list[Operations]]:
    told: list[Selection] = []
    used: list[Operations] = []
    done = threading.Event()

    def tell(choice: Selection) -> None:
        told.append(choice)
        if choice.value != "compiling":
            done.set()

    kernels.prepare(use or used.append, tell, folder)
    assert done.wait(COMPILE_S)
    return told, used
