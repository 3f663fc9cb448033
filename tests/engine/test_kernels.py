"""The compiled operations against torch's, and what happens where they cannot be had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from api.engine import kernels
from api.engine.attention import attend
from api.engine.kernels import CompiledOperations
from api.engine.linear import Linear
from api.engine.operations import Group, Operations, TorchOperations, read_pages
from api.engine.placement import Choice

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
    assert hasattr(torch.ops.glm, "product") == ("avx512_bf16" in kernels._processor())
    if not hasattr(torch.ops.glm, "product"):
        return  # compiled for a processor without the instruction: Linear stays with torch
    weight, x = (some(features, inputs).float() / inputs**0.5).bfloat16(), some(rows, inputs)
    for bias, gated in ((None, False), (some(features), False), (None, True)):
        linear = Linear(weight, bias, gated)
        wanted = linear(x)

        linear.pack()

        assert linear._panels is not None and linear._weight is None
        assert close(linear(x), wanted)


def test_a_product_that_does_not_fit_the_panels_stays_as_it_is(ours: Operations) -> None:
    x = some(3, 64)
    for linear in (Linear(some(40, 64)), Linear(some(32, 63))):
        linear.pack()

        assert linear._panels is None
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
    group = Group(0, len(lengths), pages, mask, torch.tensor(lengths))
    qkv = some(len(lengths), kv_heads * (shared + 2), dim) * 2

    found = ours.attend_single(qkv, kv, group)

    assert close(found, THEIRS.attend_single(qkv, kv, group))


def test_rows_of_a_prompt_one_by_one_are_what_they_are_together(ours: Operations) -> None:
    rows, first, kv_heads, shared, dim = 20, 30, 2, 3, 32
    kv, qkv = some(8 * PAGE, 2 * kv_heads, dim), some(rows, kv_heads * (shared + 2), dim)
    pages, seen = torch.tensor([5, 2, 7, 1]), torch.arange(first + 1, first + rows + 1)
    q = qkv[:, : kv_heads * shared].view(rows, kv_heads, shared, dim).permute(1, 2, 0, 3)
    k, v = read_pages(kv, pages, PAGE).transpose(0, 1).split(kv_heads)
    later = torch.where(torch.arange(4 * PAGE) < seen[:, None], 0.0, -torch.inf).to(torch.bfloat16)
    together = attend(q, k, v, later).permute(2, 0, 1, 3).reshape(rows, -1)

    one_by_one = ours.attend_single(qkv, kv, Group(0, rows, pages.repeat(rows, 1), None, seen))

    assert close(one_by_one, together)


def test_what_lies_beyond_a_length_is_never_seen(ours: Operations) -> None:
    kv = some(2 * PAGE, 2, 64)
    kv[20:] = torch.inf
    group = Group(0, 1, torch.tensor([[0, 1]]), None, torch.tensor([20]))

    found = ours.attend_single(some(1, 3, 64), kv.nan_to_num(posinf=3e38), group)

    assert found.isfinite().all() and found.abs().max() < 10


def test_they_fit_bfloat16_on_the_cpu_only() -> None:
    cpu = torch.device("cpu")

    assert kernels.obstacle(cpu, torch.bfloat16, 16, 128) is None
    assert "float32" in str(kernels.obstacle(cpu, torch.float32, 16, 128))
    assert "CPU" in str(kernels.obstacle(torch.device("cuda"), torch.bfloat16, 16, 128))
    assert "80" in str(kernels.obstacle(cpu, torch.bfloat16, 16, 80))
    assert "32" in str(kernels.obstacle(cpu, torch.bfloat16, 32, 64))


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
        def attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: Group) -> torch.Tensor:
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


def prepared(folder: Path) -> tuple[list[Choice], list[Operations]]:
    told: list[Choice] = []
    used: list[Operations] = []
    done = threading.Event()

    def tell(choice: Choice) -> None:
        told.append(choice)
        if choice.value != "compiling":
            done.set()

    kernels.prepare(used.append, tell, folder)
    assert done.wait(COMPILE_S)
    return told, used
