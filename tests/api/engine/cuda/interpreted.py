"""The CUDA kernels against torch, in Triton's interpreter: run by test_kernels.py with TRITON_INTERPRET=1.

Attention is tested in float32 and float16: the interpreter multiplies bfloat16 wrongly, and cuts off where a device
rounds, hence a tolerance of a step in bfloat16.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from prompts import Steps, ask, draw_image, generate, request_for

from api.engine.config import EngineConfig
from api.engine.cuda.attention import DecodePlan, PrefillPlan, decode_scratch, paged_decode, paged_prefill
from api.engine.cuda.linear import CudaNf4Linear
from api.engine.cuda.nf4 import Nf4Plan, nf4_product
from api.engine.cuda.operations import PATHS, CudaOperations
from api.engine.cuda.penalties import penalise
from api.engine.cuda.quantization import quantize_rows, rescale
from api.engine.cuda.rotation import rotate_image, rotate_store
from api.engine.cuda.rows import add_norm, add_norm_float8, add_rms_norm, rms_norm, silu_mul
from api.engine.loading.loader import load
from api.engine.loading.operations import OperationsChoice
from api.engine.loading.placement import Selection
from api.engine.model.decoder import Observer
from api.engine.model.operations import AttentionMetadata, TorchOperations
from api.engine.model.quantized_linear import NF4_BLOCK, Nf4Linear, bitsandbytes_ops
from api.engine.model.recipe import make_recipe
from api.engine.model.rotary import rotate
from api.engine.model.sampler import penalise_counts, penalise_seen
from api.engine.request import Request, SamplingParams
from api.engine.sequence import make_sequence

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels.py runs these"

PAGE, EPS = 16, 1e-5
THEIRS = TorchOperations(PAGE)
KINDS = [torch.float32, torch.float16, torch.bfloat16]
# heads, key heads, head_dim: one group, several, 16 to one as in the real model, and a number that is no power of two
HEADS = [(2, 1, 16), (8, 2, 32), (16, 1, 16), (6, 2, 16)]
EDGES = [1, 15, 16, 17, 31, 32, 33, 255, 256, 257]
BEYOND = 2**30  # a page number that must not be followed


@pytest.fixture(autouse=True)
def other_numbers_in_every_test(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def close(found: torch.Tensor, wanted: torch.Tensor, steps: float = 2) -> None:
    """Equal but for some of the last steps of the number format."""
    error = steps * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), wanted.float(), rtol=max(error, 1e-5), atol=max(error, 1e-5))


class Cache:
    """Sequences of the given lengths in random pages. All other rows are NaN, all other table entries out of range."""

    def __init__(self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, index=torch.int32) -> None:
        pages = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(pages) + 1)
        self.kv = poisoned(len(order) * PAGE, 2 * kv_heads, head_dim, dtype=dtype)
        self.tables = torch.full((len(lengths), max(pages) + 1), BEYOND, dtype=index)
        self.lengths = torch.tensor(lengths, dtype=index)
        self.rows = []
        for number, length in enumerate(lengths):
            self.tables[number, : pages[number]] = order[sum(pages[:number]) :][: pages[number]]
            tokens = torch.arange(length)
            self.rows.append(self.tables[number].long()[tokens // PAGE] * PAGE + tokens % PAGE)
            self.kv[self.rows[-1]] = randn(length, 2 * kv_heads, head_dim, dtype=dtype)

    def exact(self, number: int, q: torch.Tensor) -> torch.Tensor:
        """What the last rows of a sequence see, in float64: [rows, heads, head_dim]."""
        k, v = self.kv[self.rows[number]].double().transpose(0, 1).chunk(2)
        q = q.double().transpose(0, 1).unflatten(0, (len(k), -1))
        later = torch.ones(q.shape[2], k.shape[1]).triu(k.shape[1] - q.shape[2] + 1).bool()
        scores = (q @ k[:, None].transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        return (scores.softmax(-1) @ v[:, None]).flatten(0, 1).transpose(0, 1)


def qkv_of(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return randn(rows, heads + 2 * kv_heads, head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", KINDS[:2], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_decode_of_ragged_lengths(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [*EDGES, 0, int(torch.randint(1, 400, ()))]
    cache = Cache(lengths, kv_heads, head_dim, dtype)
    q = qkv_of(len(lengths), heads, kv_heads, head_dim, dtype)[:, :heads]
    out = poisoned(len(lengths), heads, head_dim, dtype=dtype)

    assert paged_decode(q, cache.kv, cache.tables, cache.lengths, PAGE, out, plan=DecodePlan(4, 32)) is out

    for number, length in enumerate(lengths):
        wanted = cache.exact(number, q[number : number + 1])[0] if length else torch.zeros(heads, head_dim)
        close(out[number], wanted)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_decode_does_not_depend_on_neighbours_nor_on_the_table_nor_on_the_room(index: torch.dtype) -> None:
    cache = Cache([300, 7, 129], 2, 32, torch.float16, index)
    q = qkv_of(3, 8, 2, 32, torch.float16)[:, :8]
    plan = DecodePlan(4, 32)
    scratch = decode_scratch(9, 8, 32, "cpu", plan)
    for part in scratch:
        part.fill_(torch.nan)

    together = paged_decode(q, cache.kv, cache.tables, cache.lengths, PAGE, scratch=scratch, plan=plan)

    for number in range(3):
        wide = torch.full((1, 70), BEYOND, dtype=index)
        wide[0, : cache.tables.shape[1]] = cache.tables[number]
        alone = paged_decode(
            q[number : number + 1], cache.kv, wide, cache.lengths[number : number + 1], PAGE, plan=plan
        )
        assert torch.equal(alone[0], together[number])


@pytest.mark.parametrize("dtype", KINDS[:2], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 17), (5, 3), (15, 1), (240, 33)])
def test_prefill_of_a_chunk(
    first: int, rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    cache = Cache([first + rows], kv_heads, head_dim, dtype)
    q = qkv_of(rows, heads, kv_heads, head_dim, dtype)[:, :heads]
    out = poisoned(rows, heads, head_dim, dtype=dtype)

    paged_prefill(q, cache.kv, cache.tables, rows, PAGE, first, out=out, plan=PrefillPlan(32, 32))

    close(out, cache.exact(0, q))


def test_prefill_of_several_sequences_leaves_padding_as_it_is() -> None:
    firsts, counts = [0, 100, 16, 3], [33, 1, 16, 20]
    cache = Cache([a + b for a, b in zip(firsts, counts, strict=True)], 2, 16, torch.float16)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    q = qkv_of(sum(counts) + 5, 8, 2, 16, torch.float16)[:, :8]
    out = poisoned(len(q), 8, 16, dtype=torch.float16)

    paged_prefill(
        q, cache.kv, cache.tables, 40, PAGE,
        starts=starts, firsts=torch.tensor(firsts).int(), out=out, plan=PrefillPlan(32, 16),
    )  # fmt: skip

    for number, part in enumerate(q[:-5].split(counts)):
        close(out[starts[number] : starts[number + 1]], cache.exact(number, part))
    assert out[-5:].isnan().all()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("from_tables", [True, False], ids=["tables", "rows"])
def test_rotate_store(from_tables: bool, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = qkv_of(5, heads, kv_heads, head_dim, dtype)
    kv = randn(40, 2 * kv_heads, head_dim, dtype=dtype)
    cos, sin = randn(60, head_dim, dtype=dtype), randn(60, head_dim, dtype=dtype)
    positions = torch.tensor([59, 0, 7, 7, 31], dtype=torch.int32)
    slots = torch.tensor([39, 0, -1, 17, 5])
    at = positions.long()
    rotated = rotate(qkv[:, : heads + kv_heads], cos[at][:, None], sin[at][:, None])
    wanted, stored = torch.cat([rotated, qkv[:, heads + kv_heads :]], 1), kv.clone()
    stored[slots[slots >= 0]] = wanted[slots >= 0][:, heads:]

    if from_tables:
        found = rotate_store(qkv, cos, sin, kv, slots, positions)
    else:
        found = rotate_store(qkv, cos[at], sin[at], kv, slots.int())

    close(found, wanted)
    close(kv, stored)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("heads", [2, 3])
def test_rotate_image_is_as_exact_as_float32(heads: int, dtype: torch.dtype) -> None:
    qkv, cos, sin = randn(7, 3 * heads * 32, dtype=dtype), randn(7, 32), randn(7, 32)
    q, k, v = qkv.float().view(7, 3, heads, 32).unbind(1)
    wanted = torch.stack([rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None]), v], 1)

    close(rotate_image(qkv, cos, sin, heads), wanted.flatten(1))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 33), (2, 4096)])
def test_norms(rows: int, size: int, dtype: torch.dtype) -> None:
    x, delta, norm1, norm2 = (randn(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,), (size,)))

    found, wanted = add_norm(x, delta, norm1, norm2, EPS), THEIRS.add_norm(x, delta, norm1, norm2, EPS)
    close(found[0], wanted[0], 4)
    close(found[1], F.rms_norm(found[0], (size,), norm2, EPS), 4)
    close(found[1], wanted[1], 12)  # the steps of the sum, weighted
    close(rms_norm(x, norm1, EPS), F.rms_norm(x, (size,), norm1, EPS), 4)
    y, normed = add_rms_norm(x, delta, norm2, EPS)
    close(y, x + delta)
    close(normed, F.rms_norm(y, (size,), norm2, EPS), 4)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "inner"), [(1, 1), (3, 33), (2, 1700)])
def test_silu_mul(rows: int, inner: int, dtype: torch.dtype) -> None:
    gate_up = 3 * randn(rows, 2 * inner, dtype=dtype)
    out = poisoned(rows, inner, dtype=dtype)

    assert silu_mul(gate_up, out) is out

    gate, up = gate_up.chunk(2, -1)
    close(out, F.silu(gate) * up, 6)


@pytest.mark.parametrize("size", [33, 4096, 9000])
def test_penalties(size: int) -> None:
    penalties = torch.tensor([(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.3), (0.8, -0.5, 0.2)])
    logits = randn(5, size)
    counts = torch.randint(0, 4, (7, size), dtype=torch.int16)
    seen, slots = (counts > 0) | (torch.rand(7, size) < 0.2), torch.tensor([6, 0, 2, 5, 1], dtype=torch.int32)
    repetition, presence, frequency = penalties.t().contiguous()
    before = logits.clone()

    penalise(logits, seen, counts, slots, repetition, presence, frequency)

    wanted = penalise_seen(before, seen[slots], repetition[:, None])
    close(logits, penalise_counts(wanted, counts[slots], presence[:, None], frequency[:, None]))
    assert torch.equal(logits[0], before[0])


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 33), (2, 1700)])
def test_rows_in_float8_are_as_exact_as_their_format(rows: int, size: int) -> None:
    x = randn(rows, size, dtype=torch.float16) * torch.logspace(-2, 2, rows)[:, None].half()
    x[0, 0] = 0

    values, scales = quantize_rows(x)

    assert values.dtype == torch.float8_e4m3fn and scales.shape == (rows, 1)
    assert torch.allclose(values.float().abs().amax(1), torch.tensor(448.0))
    # Three bits after the leading one: an eighth where the interpreter cuts off. It also halves one number in a
    # hundred, just below a power of two.
    near = torch.isclose(values.float() * scales, x.float(), rtol=0.126, atol=float(scales.min()) / 64)
    assert near.float().mean() > 0.9


def packed(features: int, depth: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix as bitsandbytes packs it, and what it unpacks: values, scales, float32 [features, depth]."""
    ops = bitsandbytes_ops()
    weight = randn(features, depth, dtype=torch.float16) * torch.logspace(-2, 1, features)[:, None].half()
    values, scales = ops.quantize_4bit(weight, NF4_BLOCK, "nf4", torch.uint8)
    return values, scales, ops.dequantize_4bit(values, scales, NF4_BLOCK, "nf4", (features, depth), torch.float32)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64])
@pytest.mark.parametrize(("features", "depth", "splits"), [(64, 64, 1), (48, 320, 1), (80, 320, 3), (70, 256, None)])
def test_products_of_few_rows_in_nf4(features: int, depth: int, splits: int | None, rows: int, biased: bool) -> None:
    values, scales, weight = packed(features, depth)
    x, bias = randn(rows, depth, dtype=torch.float16), randn(features, dtype=torch.float16) if biased else None

    found = nf4_product(x, values, scales, features, bias, Nf4Plan(32, splits=splits))

    assert found.dtype == torch.float16
    bias = torch.zeros(features) if bias is None else bias.float()
    # The weights are multiplied as float16 has them.
    sizes = F.linear(x.float().abs(), weight.abs(), bias.abs())
    assert ((found - F.linear(x.float(), weight, bias)).abs() / sizes).max() < 1e-3


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_in_nf4_does_not_depend_on_the_others(splits: int) -> None:
    values, scales, _ = packed(96, 320)
    x, plan = randn(40, 320, dtype=torch.float16), Nf4Plan(32, splits=splits)

    together = nf4_product(x, values, scales, 96, plan=plan)

    for row in (0, 1, 17, 39):
        assert torch.equal(nf4_product(x[row : row + 1], values, scales, 96, plan=plan)[0], together[row])


@pytest.mark.parametrize("gated", [False, True])
def test_a_linear_in_nf4_multiplies_few_rows_by_the_kernel(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        "api.engine.cuda.linear.nf4_product", lambda x, *args: called.append(len(x)) or nf4_product(x, *args)
    )
    operations = CudaOperations(PAGE, recipe=make_recipe("nf4"))
    weight, bias = randn(64, 128, dtype=torch.float16), randn(64, dtype=torch.float16)
    linear, plain = operations.linear(weight, bias, gated), Nf4Linear(weight, bias, gated)
    assert isinstance(linear, CudaNf4Linear)

    for rows in (1, 2, 3, 64, 65):
        x = randn(rows, 128, dtype=torch.float16)
        found, wanted = linear(x), plain(x)
        assert found.shape == wanted.shape and (found - wanted).norm() < 4e-3 * wanted.norm()
    operations.use_plain(["nf4"])
    linear(x[:3])

    assert called == [3, 64]


def test_a_row_of_zeros_stays_zero_in_float8() -> None:
    values, scales = quantize_rows(torch.zeros(2, 40, dtype=torch.float16))

    assert not values.float().any() and scales.isfinite().all() and (scales > 0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_rescale(biased: bool, gated: bool) -> None:
    product, row, column, bias = randn(3, 70), torch.rand(3, 1), torch.rand(70), randn(70, dtype=torch.float16)
    exact = product * row * column + (bias.float() if biased else 0)
    if gated:
        exact = F.silu(exact[:, :35]) * exact[:, 35:]

    found = rescale(product, row, column, bias if biased else None, gated, torch.float16)

    close(found, exact, 4)


@pytest.mark.parametrize("dtype", KINDS[:2], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 33)])
def test_normed_rows_in_float8_are_those_of_two_kernels(rows: int, size: int, dtype: torch.dtype) -> None:
    x, delta, norm1, norm2 = (randn(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,), (size,)))

    y, found = add_norm_float8(x, delta, norm1, norm2, EPS)

    wanted_y, normed = add_norm(x, delta, norm1, norm2, EPS)
    values, scales = quantize_rows(normed)
    assert torch.equal(y, wanted_y) and torch.equal(found.scales, scales)
    assert torch.equal(found.values.float(), values.float())


def test_operations_hand_rows_in_float8_to_their_products() -> None:
    operations = CudaOperations(PAGE, recipe=make_recipe("fp8"))
    qkv, gate_up = operations.linear(randn(64, 32), randn(64)), operations.linear(randn(96, 32), None, gated=True)
    x, delta, norm = randn(3, 32), randn(3, 32), randn(32)

    rows = operations.add_norm(x, delta, norm, norm, EPS, following=qkv)[1]
    normed = operations.add_norm(x, delta, norm, norm, EPS)[1]
    assert not isinstance(rows, torch.Tensor) and isinstance(normed, torch.Tensor)
    assert torch.equal(qkv(rows), qkv(normed))
    assert torch.equal(gate_up(rows), gate_up(normed))

    operations.use_plain(["float8"])
    assert isinstance(operations.add_norm(x, delta, norm, norm, EPS, following=qkv)[1], torch.Tensor)


@pytest.mark.parametrize("plain", [(), ("decode",), ("prefill",), PATHS], ids=str)
def test_operations_attend_as_torch_does(plain: tuple[str, ...]) -> None:
    ours = CudaOperations(PAGE)
    ours.use_plain(plain)
    ours.prepare(2, 6, 16, torch.device("cpu"))
    qkv, kv = qkv_of(3, 6, 2, 16, torch.float32), randn(8 * PAGE, 4, 16)
    tables, lengths = torch.randperm(8).view(2, 4), torch.tensor([40, 3])
    beyond = torch.arange(64) >= lengths[:, None]
    mask = torch.zeros(2, 64).masked_fill(beyond, -torch.inf)[:, None, None]
    rows = AttentionMetadata(0, 2, tables, mask, lengths)
    later = torch.arange(64) > torch.arange(30, 33)[:, None]
    chunk = AttentionMetadata(0, 3, tables[0], torch.zeros(3, 64).masked_fill(later, -torch.inf), first=30)

    torch.testing.assert_close(ours.attend_decode(qkv[:2], kv, rows), THEIRS.attend_decode(qkv[:2], kv, rows))
    torch.testing.assert_close(ours.attend_prefill(qkv, kv, chunk), THEIRS.attend_prefill(qkv, kv, chunk))
    image, cos, sin = randn(12, 3 * 2 * 16), randn(12, 16), randn(12, 16)
    wanted = THEIRS.attend_image(image, cos, sin, 2, 2)
    torch.testing.assert_close(ours.attend_image(image, cos, sin, 2, 2), wanted)


def test_more_rows_than_there_is_room_for_are_decoded_too() -> None:
    ours = CudaOperations(PAGE)
    ours.prepare(1, 6, 16, torch.device("cpu"))
    cache = Cache([20, 40], 2, 16, torch.float32)
    qkv = qkv_of(2, 6, 2, 16, torch.float32)

    found = ours.attend_decode(qkv, cache.kv, AttentionMetadata(0, 2, cache.tables, None, cache.lengths))

    close(found[1].view(6, 16), cache.exact(1, qkv[1:, :6])[0])


def test_the_engine_answers_with_the_tokens_of_generate(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Glm4vForConditionalGeneration

    plans = DecodePlan(splits=4), PrefillPlan(queries=32)
    monkeypatch.setattr("api.engine.cuda.operations.plans_for", lambda capability: plans)
    choice = CudaOperations(PAGE), Selection("cuda", "a test")
    monkeypatch.setattr(OperationsChoice, "choose", lambda self: choice)
    config = EngineConfig(model=str(tiny_checkpoint), threads=1, device="cpu", slots=4, encoder_cache_bytes=2**26)
    model = load(config, lambda fraction: None)
    reference = Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    requests = [
        request_for(model, [ask("Hello, what is this?")], [], name="text", max_tokens=6),
        request_for(model, [ask("The red circle?", 1)], [draw_image(1, (112, 90))], name="picture", max_tokens=6),
    ]

    answers = Steps(model, 23).run(*requests)

    assert answers == [generate(reference, model, request) for request in requests]
    assert len(set(answers[0] + answers[1])) > 1


def test_layers_in_float8_are_the_same_when_they_are_observed(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "api.engine.cuda.operations.plans_for", lambda capability: (DecodePlan(splits=4), PrefillPlan(queries=32))
    )
    choice = CudaOperations(PAGE, recipe=make_recipe("fp8")), Selection("cuda", "a test")
    monkeypatch.setattr(OperationsChoice, "choose", lambda self: choice)
    config = EngineConfig(model=str(tiny_checkpoint), threads=1, device="cpu", slots=2, encoder_cache_bytes=2**26)
    runner = load(config, lambda fraction: None).runner
    quantized = []
    monkeypatch.setattr(
        "api.engine.cuda.linear.quantize_rows", lambda x: quantized.append(len(x)) or quantize_rows(x)
    )
    seen: dict[int, torch.Tensor] = {}

    def answer(observe: Observer | None) -> torch.Tensor:
        sequence = make_sequence(Request("a", tuple(range(5, 17)), SamplingParams(max_tokens=1)), lambda event: None, 1)
        return runner.answer_alone(sequence, observe)

    alone = answer(None)
    unobserved, layers = len(quantized), runner.decoder.layers
    observed = answer(lambda number, x, normed: seen.update({number: normed}))

    assert torch.equal(alone, observed) and alone.isfinite().all()
    # The outputs of attention and of gates in every layer, and the input of the first, or of each. The vocabulary does not
    # fit float8.
    assert unobserved == 2 * layers + 1 and len(quantized) - unobserved == 3 * layers
    assert len(seen) == layers
