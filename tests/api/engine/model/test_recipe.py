"""Quantised products against exact ones, the bytes that they take, and a whole model of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from api.engine.loaded_model import Model
from api.engine.model import quantized_linear
from api.engine.model.quantized_linear import Fp8Linear, Int8Linear, Nf4Linear, quantize_rows
from api.engine.model.recipe import Recipe, make_recipe
from api.engine.model.weights import raw_bytes
from api.engine.request import Request

ERRORS = {Fp8Linear: 0.045, Int8Linear: 0.012, Nf4Linear: 0.11}  # largest relative error on Gaussian numbers
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def case(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    weight = torch.randn(320, 192) * torch.rand(320, 1) * 3  # outputs of different size, as trained ones are
    return torch.randn(rows, 192).to(dtype), weight.to(dtype), torch.randn(320).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    first, second = y.chunk(2, dim=-1)
    return F.silu(first) * second if gated else y


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("linear", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_a_product_is_near_the_exact_one(linear: type, dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = case(rows, dtype)
    for used, gated in product((None, bias), (False, True)):
        found = linear(weight, used, gated)(x)

        assert found.dtype == dtype and found.shape == (rows, 160 if gated else 320)
        assert error(found, exact(x, weight, used, gated)) < ERRORS[linear] * (2 if gated else 1)


@pytest.mark.parametrize("linear", [Int8Linear, Nf4Linear])
def test_a_product_cut_by_outputs_is_the_same(linear: type, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = case(40)
    whole = linear(weight, bias)(x)
    monkeypatch.setattr(quantized_linear, "SCRATCH_BYTES", 2 * 64 * 192 * 4)  # 128 of 320 outputs

    assert torch.allclose(linear(weight, bias)(x), whole, rtol=1e-6, atol=1e-6)


def test_a_large_product_takes_no_more_than_its_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = torch.ops.bitsandbytes.gemm_4bit
    weight = torch.randn(4096, 64)
    linear = Nf4Linear(weight)
    monkeypatch.setattr(quantized_linear, "SCRATCH_BYTES", 2**16)
    monkeypatch.setattr(torch.ops.bitsandbytes, "gemm_4bit", lambda *a: sizes.append(a[2]) or original(*a))

    linear(torch.randn(9, 64))

    assert {rows * columns * 4 for rows, columns in sizes} == {2**16} and len(sizes) == 16


def test_a_row_of_zeros_and_a_row_that_is_not_finite_stay_what_they_are() -> None:
    weight = torch.randn(32, 64)
    x = torch.randn(3, 64)
    x[0], x[1, 7] = 0.0, float("nan")

    found = Fp8Linear(weight)(x)

    assert not found[0].any() and not found[1].isfinite().any() and found[2].isfinite().all()


def test_quantising_row_by_row_uses_the_whole_range() -> None:
    values, scales = quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [1e-3, 0.0, 1e-4]]))

    assert values.float().abs().amax(dim=-1).tolist() == [448.0, 448.0]
    assert torch.allclose(values.float() * scales, torch.tensor([[1.0, -2.0, 0.5], [1e-3, 0.0, 1e-4]]), rtol=0.04)


@pytest.mark.parametrize("name", ["bf16", "fp8", "nf4"])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(320, 192), (100, 192), (320, 72), (1536, 1176)])
def test_the_bytes_of_a_recipe_are_those_of_its_products(name, small: bool, rows: int, columns: int) -> None:
    recipe = make_recipe(name, small, (8, 9))
    weight = torch.randn(rows, columns).bfloat16()
    for role in ("text", "head", "vision"):
        linear = recipe.linear(role, weight, None, False)
        held = sum(len(raw_bytes(t)) for t in vars(linear).values() if isinstance(t, torch.Tensor) and not t.is_mkldnn)

        assert recipe.bytes_of(rows, columns, role) == (held or weight.nbytes)


def test_a_recipe_chooses_formats_by_part_shape_and_card() -> None:
    assert make_recipe("nf4") == Recipe("nf4", "nf4", "nf4", "plain")
    assert make_recipe("nf4", small=True, capability=(7, 5)).vision == "int8"
    assert make_recipe("nf4", small=True, capability=(12, 0)).vision == "fp8"
    assert make_recipe("nf4").format_of("text", 100, 100) == "plain"
    assert make_recipe("fp8").format_of("text", 100, 128) == "plain"
    assert make_recipe("fp8").format_of("head", 128, 128) == "fp8"


@pytest.mark.parametrize(("name", "small"), [("fp8", False), ("nf4", False), ("nf4", True), ("bf16", True)])
def test_the_demo_answers_in_every_recipe(name, small: bool) -> None:
    from network_source import NetworkSource
    from prompts import Steps, ask, request_for

    from api.engine.config import EngineConfig
    from api.engine.loading.loader import load
    from api.engine.model.operations import TorchOperations
    from api.engine.model.runner import Glm4vRunner
    from api.engine.model.weights import part_sums, weights_of
    from models.shapes.pictures import draw_shapes
    from settings import ROOT

    def answer(model: Model, request: Request) -> list[int]:
        output = Steps(model).run(request)[0]
        return output[: next(place for place, token in enumerate(output) if token in model.end_ids)]

    folder: Path = ROOT / "models" / "shapes"
    model = load(EngineConfig(model=str(folder), threads=1, device="cpu", dtype="float32"), lambda fraction: None)
    request = request_for(model, [ask("What color is the circle?", 1)], [draw_shapes([("red", "circle")])], max_tokens=24)
    expected = answer(model, request)
    from transformers import Glm4vForConditionalGeneration

    network = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    plain = sum(len(raw_bytes(tensor)) for _, tensor in weights_of(model.runner))
    operations = TorchOperations(model.capacity.page_tokens, make_recipe(name, small))

    runner = Glm4vRunner(NetworkSource(network), model.capacity, model.context_tokens, operations)
    model = replace(model, runner=runner)

    assert answer(model, request) == expected
    held = sum(len(raw_bytes(tensor)) for _, tensor in weights_of(model.runner))
    assert held < plain * 0.75 and len(list(part_sums(model.runner))) > 100
