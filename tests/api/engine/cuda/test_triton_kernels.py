"""The CUDA kernels without a card: against torch in Triton's interpreter, and compiled ahead for every generation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

from settings import ROOT

HERE = Path(__file__).resolve().parent
KIB = 1024
SHARED = {75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}  # of one program


def in_the_interpreter(*command: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith(("PYTEST_", "COV_"))}
    ran = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    return ran.stdout


def test_the_kernels_compute_what_torch_computes() -> None:
    output = in_the_interpreter(
        "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "interpreted.py")
    )

    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 100 and "skipped" not in output, output[-2000:]


def test_the_measurement_for_a_card_runs_dry() -> None:
    output = in_the_interpreter("bench.kernels_gpu", "--dry", "--sweep")

    assert "all right" in output and "Traceback" not in output
    assert output.count("ok ") > 20


@pytest.fixture(scope="module", autouse=True)
def folder_for_binaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()


def compiled(kernel: Any, capability: int, warps: int, stages: int = 2, **arguments: Any) -> Any:
    """A kernel for a device. `arguments`: types of the form "*bf16" or "i32", or the values of constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    assert set(arguments) == set(kernel.arg_names)
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = {  # as tensors from torch are
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith(("_row", "features", "depth", "row_bytes"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def number_format(capability: int) -> str:
    return "*fp16" if capability < 80 else "*bf16"


@pytest.mark.parametrize("capability", SHARED)
def test_attention_compiles_ahead_and_fits_the_device(capability: int) -> None:
    from api.engine.cuda import attention

    kind = number_format(capability)
    decode, prefill = attention.plans_for(divmod(capability, 10))
    heads = {"KV_HEADS": 2, "GROUP": 16, "HEAD_DIM": 128, "PAGE": 16}
    strides = {"q_row": "i32", "table_row": "i32", "scale": "fp32"}
    part = compiled(
        attention._decode_part, capability, decode.warps, decode.stages,
        q=kind, kv=kind, tables="*i32", lengths="*i32", parts="*fp32", sums="*fp32",
        SPLITS=decode.splits, TILE=16, BLOCK=decode.block, LEAST=decode.least, **heads, **strides,
    )  # fmt: skip
    join = compiled(
        attention._decode_join, capability, 4, parts="*fp32", sums="*fp32", lengths="*i32", out=kind,
        SPLITS=decode.splits, HEADS=32, HEAD_DIM=128, BLOCK=decode.block, LEAST=decode.least,
    )  # fmt: skip
    chunks = [
        compiled(
            attention._prefill, capability, prefill.warps, prefill.stages,
            q=kind, kv=kind, tables="*i32", starts="*i32", firsts="*i32", out=kind, first="i32", rows="i32",
            RAGGED=ragged, QUERIES=prefill.queries, KEYS=prefill.keys, **heads, **strides,
        )
        for ragged in (False, True)
    ]  # fmt: skip

    for kernel in (part, join, *chunks):
        assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED[capability]
    if capability >= 80:  # copies of the next keys are under way while these are multiplied
        for kernel in (part, *chunks) if prefill.stages > 2 else ():
            assert re.search(r"cp\.async\.wait_group\s+[1-9]", kernel.asm["ptx"])
        products = "wgmma.mma_async" if capability == 90 else "mma.sync"
        assert all(products in kernel.asm["ptx"] for kernel in chunks)


@pytest.mark.parametrize("capability", SHARED)
def test_work_on_rows_compiles_ahead(capability: int) -> None:
    from api.engine.cuda import penalties, quantization, rotation, rows

    kind = number_format(capability)
    kernels = [
        compiled(
            penalties._penalise, capability, 8, logits="*fp32", seen="*u8", counts="*i16", slots="*i32",
            repetition="*fp32", presence="*fp32", frequency="*fp32", size="i32", BLOCK=penalties.BLOCK,
        ),
        compiled(
            rotation._rotate, capability, 2, qkv=kind, cos=kind, sin=kind, positions="*i32", kv=kind, slots="*i64",
            cos_row="i32", sin_row="i32", qkv_row="i32", ROTATED=34, TOTAL=36, STORED=4, HALF=64, AT_POSITIONS=True,
            ROUNDED=True, HEADS=4,
        ),
        compiled(
            rotation._rotate, capability, 2, qkv=kind, cos="*fp32", sin="*fp32", positions=kind, kv=kind, slots=kind,
            cos_row="i32", sin_row="i32", qkv_row="i32", ROTATED=24, TOTAL=24, STORED=0, HALF=64, AT_POSITIONS=False,
            ROUNDED=False, HEADS=4,
        ),
        compiled(
            rows._add_norm, capability, 8, x=kind, delta=kind, delta_norm=kind, norm=kind, y=kind, normed=kind,
            scales=kind, hidden="i32", eps="fp32", ADDED=True, DELTA_NORMED=True, FLOAT8=False, BLOCK=4096,
            LARGEST=448.0, SMALLEST=1e-12,
        ),
        compiled(rows._silu_mul, capability, 4, gate_up=kind, out=kind, inner="i32", BLOCK=1024),
    ]  # fmt: skip
    if capability >= 89:
        kernels += [
            compiled(
                quantization._quantize, capability, 16, x=kind, values="*fp8e4nv", scales="*fp32", size="i32",
                BLOCK=16384, LARGEST=448.0, SMALLEST=1e-12,
            ),
            compiled(
                rows._add_norm, capability, 8, x=kind, delta=kind, delta_norm=kind, norm=kind, y=kind,
                normed="*fp8e4nv", scales="*fp32", hidden="i32", eps="fp32", ADDED=True, DELTA_NORMED=True, FLOAT8=True,
                BLOCK=4096, LARGEST=448.0, SMALLEST=1e-12,
            ),
        ]  # fmt: skip
        for gated in (False, True):
            kernels += [
                compiled(
                    quantization._rescale, capability, 4, product="*fp32", row_scales="*fp32", column_scales="*fp32",
                    bias=kind, out=kind, width="i32", features="i32", BIASED=True, GATED=gated, BLOCK=1024,
                ),
            ]  # fmt: skip

    assert all(kernel.asm["cubin"] for kernel in kernels)


@pytest.mark.parametrize("capability", SHARED)
def test_products_in_nf4_compile_ahead(capability: int) -> None:
    from api.engine.cuda import nf4

    kind, plan = number_format(capability), nf4.Nf4Plan()
    for tile, parts in ((16, kind), (64, "*fp32")):
        product = compiled(
            nf4._product, capability, plan.warps, 1, x=kind, values="*u8", scales="*fp32", table="*i32", bias=kind,
            parts=parts, rows="i32", features="i32", depth="i32", row_bytes="i32", blocks="i32", of_split="i32",
            BIASED=parts == kind, TILE=tile, FEATURES=plan.features, BLOCK=nf4.BLOCK,
        )  # fmt: skip
        assert product.metadata.shared <= SHARED[capability]
        assert "cp.async" not in product.asm["ptx"]  # which would gather the table's entries in shared memory
        if capability >= 80:
            assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in product.asm["ptx"]
    joined = compiled(
        nf4._join, capability, 4, parts="*fp32", bias=kind, out=kind, rows="i32", features="i32", BIASED=True,
        SPLITS=8, BLOCK=1024,
    )  # fmt: skip
    assert joined.asm["cubin"]
