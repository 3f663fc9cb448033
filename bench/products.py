"""Measures each recipe's products on random matrices of the 9B model's shapes: error against float32, time, memory.

    python -m bench.products [--device cuda] [--rows 1,16,17,64,512] [--json FILE]

On a CPU float8 is emulated, so that only its errors mean something there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from api.engine.model.host_memory import device_view
from api.engine.model.linear import Role
from api.engine.model.quantized_linear import Fp8Linear, quantize_rows
from api.engine.model.recipe import Recipe, make_recipe

# Matrix, outputs, inputs, gated, its part of the model.
SHAPES: tuple[tuple[str, int, int, bool, Role], ...] = (
    ("qkv", 4608, 4096, False, "text"),
    ("out", 4096, 4096, False, "text"),
    ("gate_up", 27392, 4096, True, "text"),
    ("down", 4096, 13696, False, "text"),
    ("head", 151552, 4096, False, "head"),
    ("vision qkv", 4608, 1536, False, "vision"),
    ("vision gate_up", 8192, 1536, True, "vision"),
    ("vision down", 1536, 4096, False, "vision"),
)
OUTLIERS = 8.0  # size of one input in a hundred, as trained models have them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="1,16,17,64,512")
    parser.add_argument("--shapes", default=",".join(shape[0] for shape in SHAPES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = [int(number) for number in options.rows.split(",")]
    shapes = [shape for shape in SHAPES if shape[0] in options.shapes.split(",")]
    results = [line for shape in shapes for line in measure(device, rows, *shape)]
    if device.type == "cuda":
        results += [float8_accumulation(device), host_embeddings(device)]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), "utf-8")


@torch.inference_mode()
def measure(
    device: torch.device, rows: list[int], name: str, outputs: int, inputs: int, gated: bool, role: Role
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(outputs)
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device)
    weight.normal_(0, inputs**-0.5, generator=generator)
    for recipe in recipes(device, role):
        began = time.monotonic()
        linear = recipe.linear(role, weight, None, gated)
        _wait(device)
        packing_s = time.monotonic() - began
        for count in rows:
            x = torch.empty(count, inputs, dtype=torch.bfloat16, device=device).normal_(0, 1, generator=generator)
            x[:, ::100] *= OUTLIERS
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            y = linear(x)
            line: dict[str, Any] = {
                "matrix": name,
                "format": recipe.format_of(role, outputs, inputs),
                "rows": count,
                "error_percent": round(100 * relative_error(y, x, weight, gated), 3),
                "packing_s": round(packing_s, 3),
                "mib": round(recipe.bytes_of(outputs, inputs, role) / 2**20, 1),
            }
            if device.type == "cuda":
                line["scratch_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            line["us"] = round(1e6 * seconds(lambda: linear(x), device), 1)  # noqa: B023  called at once
            print(json.dumps(line), flush=True)
            yield line


def recipes(device: torch.device, role: Role) -> list[Recipe]:
    """One recipe for each format that a part of the model can have."""
    if role == "vision":
        return [make_recipe("bf16"), make_recipe("bf16", True, (8, 9)), make_recipe("bf16", True, (7, 5))]
    return [make_recipe("bf16"), make_recipe("fp8"), make_recipe("nf4")]


def relative_error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gated: bool) -> float:
    """Against the product in float32, of at most 8192 outputs."""
    half = len(weight) // 2
    part = slice(0, min(len(weight), 8192)) if not gated else slice(0, min(half, 8192))
    exact = F.linear(x.float(), weight[part].float())
    if gated:
        up = F.linear(x.float(), weight[half:][part].float())
        exact = F.silu(exact) * up
    found = y[:, part].float()
    return float((found - exact).norm() / exact.norm())


def float8_accumulation(device: torch.device) -> dict[str, Any]:
    """What faster accumulation costs in exactness, and a padded number of rows in time."""
    weight = torch.randn(4096, 13696, device=device, dtype=torch.bfloat16) * 13696**-0.5
    linear = Fp8Linear(weight)
    result: dict[str, Any] = {"matrix": "float8 accumulation"}
    for count in (1, 16, 17, 512):
        values, _ = quantize_rows(torch.randn(count, 13696, device=device))
        exact = F.linear(values.float(), linear._values.float())
        for fast in (False, True):
            def product(fast: bool = fast, values: torch.Tensor = values) -> torch.Tensor:
                return torch._scaled_mm(
                    values, linear._values.t(), scale_a=linear._one, scale_b=linear._one,
                    out_dtype=torch.float32, use_fast_accum=fast,
                )  # fmt: skip

            error = float((product() - exact).norm() / exact.norm())
            result[f"rows {count} fast {fast}"] = {"error": f"{error:.1e}", "us": round(1e6 * seconds(product, device), 1)}
    print(json.dumps(result), flush=True)
    return result


def host_embeddings(device: torch.device) -> dict[str, Any]:
    """Rows of a table in host memory, read by the GPU over the bus; also within a CUDA graph."""
    table = torch.randn(151552, 4096).bfloat16()
    before = torch.cuda.memory_allocated()
    view = device_view(table, device)
    used = torch.cuda.memory_allocated() - before
    result: dict[str, Any] = {"matrix": "embeddings in host memory", "device_bytes": used}
    for count in (1, 32, 512):
        ids = torch.randint(0, len(table), (count,), device=device)
        same = torch.equal(view.index_select(0, ids).cpu(), table.index_select(0, ids.cpu()))
        result[f"rows {count}"] = {
            "same": same, "us": round(1e6 * seconds(lambda: view.index_select(0, ids), device), 1)  # noqa: B023
        }  # fmt: skip
    ids = torch.zeros(4, dtype=torch.long, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = view.index_select(0, ids)
    ids.copy_(torch.tensor([5, 6, 7, 151551]))
    graph.replay()
    result["same in a graph"] = torch.equal(rows.cpu(), table[[5, 6, 7, 151551]])
    print(json.dumps(result), flush=True)
    return result


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of several runs, in a CUDA graph where there is one to be, so that launching costs nothing."""
    call()
    _wait(device)
    if device.type == "cpu":
        began = time.monotonic()
        call()
        return time.monotonic() - began
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
