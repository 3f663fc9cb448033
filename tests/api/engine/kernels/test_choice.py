"""What is chosen by the times of both implementations, the trial itself, and passes that both compute together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prompts import Steps, ask, draw_image, request_for

from api.engine.config import EngineConfig
from api.engine.kernels import build, speed
from api.engine.kernels import choice as choices
from api.engine.kernels.choice import ALL_ROWS, KINDS, PICTURE_ROWS, ROWS, Choice, ModelShape, Product, Times, decide
from api.engine.kernels.operations import DividedLinear
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.loading.operations import OperationsChoice

QKV, PICTURE = Product((96, 64, False), 2, ROWS), Product((64, 32, True), 2, PICTURE_ROWS)
SHAPE = ModelShape((QKV, PICTURE), 2, 1, 16, 2, 16)
PLENTY = 2**40
needs_instruction = pytest.mark.skipif(
    not build.processor_supported(), reason="the compiled kernels need AVX512_BF16"
)


def times_of(*faster: float, agreed: float = 1.0, error: float = 0.001) -> Times:
    """Of an operation that torch computes in `faster` times the compiled kernel's time."""
    rows = list(ROWS[: len(faster)]) if len(faster) > 1 else [0]
    return Times(rows, [1.0] * len(rows), [*faster], [*faster], [agreed] * len(rows), error, [True, True])


def chosen(product: Times, free: int = PLENTY, steady: bool = False, **attention: Times) -> Choice:
    times = {QKV.name: product, PICTURE.name: replace(times_of(1.0), rows=[256])}
    times |= {f"attention {kind}": attention.get(kind, times_of(1.0)) for kind in KINDS}
    return decide(SHAPE, times, free, steady)


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "has_fast_products", lambda: True)


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "has_fast_products", lambda: False)


@pytest.mark.parametrize(
    ("faster", "agreed", "limit"),
    [
        ((2.0, 1.5, 1.2, 1.2, 1.0, 0.95), 1.0, ALL_ROWS),  # nothing is clearly quicker than the default
        ((2.0, 1.5, 1.2, 1.2, 1.0, 0.8), 1.0, 64),
        ((1.5, 1.2, 0.8, 0.7, 0.6, 0.5), 1.0, 4),
        ((1.5, 1.2, 0.8, 0.7, 0.6, 0.5), 0.7, ALL_ROWS),  # by chance: too few rounds agree
        ((0.5, 0.5, 0.5, 0.5, 0.5, 0.5), 1.0, 0),
    ],
)
def test_a_product_is_divided_where_the_other_is_clearly_quicker(
    faster: tuple[float, ...], agreed: float, limit: int, without_amx: None
) -> None:
    choice = chosen(times_of(*faster, agreed=agreed))

    assert choice.limit(QKV.key) == limit
    assert bool(choice.signature) == (limit != ALL_ROWS)
    assert "1 rows 1/" in choice.findings[QKV.name]


def test_with_amx_onednn_is_the_default_and_panels_take_few_rows(with_amx: None) -> None:
    assert chosen(times_of(1.05, 1.05, 1.0, 0.9, 0.8, 0.5)).limit(QKV.key) == 0
    divided = chosen(times_of(1.3, 1.2, 0.9, 0.9, 0.8, 0.5))
    assert divided.limit(QKV.key) == 4
    assert f"rows decide who computes {QKV.name}" in divided.findings["a text at any load"]


def test_one_kernel_for_all_rows_where_that_is_asked_for_or_memory_is_short(with_amx: None) -> None:
    product = times_of(1.3, 1.2, 0.9, 0.9, 0.8, 0.5)

    steady, short = chosen(product, steady=True), chosen(product, free=1000)

    assert steady.limit(QKV.key) == short.limit(QKV.key) == 0
    assert steady.findings["a text at any load"].startswith("the same")
    assert "no memory for 0 MiB of weights in two forms" in short.findings[QKV.name]
    varying = replace(product, steady=[True, False])
    assert "by the number of rows" in chosen(varying, steady=True).findings["a text at any load"]


def test_results_that_differ_are_not_used_however_quick(without_amx: None) -> None:
    choice = chosen(times_of(9, 9, 9, 9, 9, 9, error=0.1), decode=times_of(9, error=float("inf")))

    assert choice.limit(QKV.key) == 0 and choice.by_torch == {"decode"}
    assert "the results differ by 0.1, so torch's are used" in choice.findings[QKV.name]


def test_each_attention_is_chosen_by_itself(without_amx: None) -> None:
    choice = chosen(times_of(*[1.0] * 6), picture=times_of(0.75), prefill=times_of(0.95))

    assert choice.by_torch == {"picture"}
    assert choice.findings["attention picture"] == "torch; ms compiled/torch: 1/0.75"
    padded = times_of(0.5)
    assert "pads the rows" in chosen(times_of(*[1.0] * 6), decode=padded).findings["a text at any load"]
    assert not chosen(times_of(*[1.0] * 6), steady=True, decode=padded).by_torch


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build.try_library(build.compile_library(build.cache_folder()))
    torch.ops.load_library(str(library))
    return tmp_path_factory.mktemp("kernels") / library.name


@needs_instruction
def test_the_trial_compares_both_and_is_made_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LIMIT_S", 300.0)
    first = speed.choose(SHAPE, library, PLENTY, steady=False)
    (file,) = library.parent.glob("*.times")
    times = speed._cached(file)
    monkeypatch.setattr(speed, "measure", lambda *arguments: pytest.fail("measured again"))

    assert speed.choose(SHAPE, library, PLENTY, steady=False) == first
    assert times is not None and times.keys() == {QKV.name, PICTURE.name, *(f"attention {kind}" for kind in KINDS)}
    assert all(each.error < choices.TOLERANCE and each.steady[0] for each in times.values())
    assert all(ms > 0 for each in times.values() for ms in (*each.compiled, *each.torch))
    file.write_text('{"product": 1}')
    with pytest.raises(pytest.fail.Exception, match="measured again"):  # a damaged file is none
        speed.choose(SHAPE, library, PLENTY, steady=False)


@needs_instruction
def test_a_machine_too_busy_for_the_trial_keeps_the_defaults_until_the_next_start(
    library: Path, monkeypatch: pytest.MonkeyPatch, without_amx: None
) -> None:
    monkeypatch.setattr(speed, "LIMIT_S", 0.0)
    shape = replace(SHAPE, heads=4)
    choice = speed.choose(shape, library, PLENTY, steady=False)

    assert choice.limit(QKV.key) == ALL_ROWS and not choice.by_torch
    assert "see the next start" in choice.findings["products"]
    assert not [*library.parent.glob(f"{library.stem}-{speed._digest(shape)}*")]


class Everything(dict):
    """A limit for whatever matrix."""

    def get(self, key: object, default: object = None) -> int:
        return 3


@needs_instruction
@pytest.mark.parametrize(
    ("default_limit", "limits", "by_torch"),
    [
        (ALL_ROWS, Everything(), ()),
        (0, {}, ()),
        (ALL_ROWS, {}, ("picture", "prefill")),
        (ALL_ROWS, Everything(), ("decode", "prefill", "picture")),
    ],
)
def test_passes_that_both_compute_equal_their_single_operations(
    default_limit: int, limits: dict, by_torch: tuple[str, ...], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Choice(default_limit, limits, frozenset(by_torch))
    monkeypatch.setattr(OperationsChoice, "_quicker", lambda self, library: chosen)
    model = loaded(tiny_checkpoint)
    runner = model.runner
    assert isinstance(next(runner.decoder.linears()), DividedLinear) == bool(isinstance(limits, Everything))
    texts = [request_for(model, [ask(text)], [], name=text) for text in ("Hello", "And how many? " * 9)]
    requests = [request_for(model, [ask("What is it?", 1)], [draw_image(1, (150, 90))], name="picture"), *texts]
    assert bool(runner.decoder._fused) == ("decode" not in by_torch) and all(runner.vision_encoder._fused)
    in_one_call = Steps(model, 40).run(*requests)

    monkeypatch.setattr(runner.decoder, "_fused", None)
    monkeypatch.setattr(runner.vision_encoder, "_fused", [None] * len(runner.vision_encoder._fused))

    assert Steps(model, 40).run(*requests) == in_one_call


def loaded(checkpoint: Path) -> Model:
    config = EngineConfig(model=str(checkpoint), threads=1, device="cpu", slots=6, dtype="bfloat16")
    model = load(config, lambda fraction: None)
    assert model.facts["kernels"] == "compiled", model.facts["choices"]["kernels"]
    return model
