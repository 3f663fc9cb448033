"""The trial of products of few rows, on the very card that will serve: cuBLAS against the kernel in several tiles.

Each matrix of the text model's layers is tried with random weights, in CUDA graphs and with more copies than the caches
hold, as in decoding. The quickest that is right is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from api.engine.cuda.linear import CudaFp8Linear, CudaLinear
from api.engine.cuda.operations import CudaOperations
from api.engine.cuda.products import ProductPlan
from api.engine.cuda.shape import Shape

PLANS = (ProductPlan(16, 256, 4, 4), ProductPlan(16, 128, 4, 4), ProductPlan(32, 128, 4, 4))
ROWS = (16, 32, 64)  # of the three tiles
COLD_BYTES = 128 * 2**20  # more than most caches hold
MOST_ERROR = 0.006  # relative, by norm: rounding in bfloat16
GAIN = 0.97  # of the time of cuBLAS that the kernel may take at most: less is noise
ROUNDS, TIMED_RUNS = 4, 5


@dataclass(frozen=True)
class Matrix:
    name: str
    features: int
    depth: int
    biased: bool = False
    gated: bool = False


def matrices(shape: Shape) -> tuple[Matrix, ...]:
    attended = shape.heads * shape.head_dim
    return (
        Matrix("qkv", attended + 2 * shape.kv_heads * shape.head_dim, shape.hidden, biased=True),
        Matrix("out", shape.hidden, attended),
        Matrix("gate_up", 2 * shape.inner, shape.hidden, gated=True),
        Matrix("down", shape.hidden, shape.inner),
    )


def try_products(
    operations: CudaOperations,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    plans: tuple[ProductPlan, ...] = PLANS,
) -> str:
    """Fills `operations.plans`, and says what was found. A lost device raises; else nothing worse happens than that
    cuBLAS computes."""
    operations.plans.clear()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "cuBLAS: Triton does not use this device's tensor cores"
    found: list[str] = []
    for matrix in matrices(shape):
        try:
            found += _try(operations, matrix, device, dtype, plans)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            found.append(f"{matrix.name}: {type(error).__name__}")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return "; ".join(found)


def _try(
    operations: CudaOperations,
    matrix: Matrix,
    device: torch.device,
    dtype: torch.dtype,
    plans: tuple[ProductPlan, ...],
) -> list[str]:
    random = torch.Generator(device).manual_seed(46)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=random)

    bias = normal(matrix.features) if matrix.biased else None
    linears: list[CudaLinear | CudaFp8Linear] = []
    while sum(linear.matrix.nbytes for linear in linears) < COLD_BYTES:
        linear = operations.linear(normal(matrix.features, matrix.depth).mul_(matrix.depth**-0.5), bias, matrix.gated)
        if not isinstance(linear, CudaLinear | CudaFp8Linear):
            return [f"{matrix.name}: no kernel multiplies few rows in this format"]
        linears.append(linear)
    found = []
    for rows in ROWS:
        x = normal(rows, matrix.depth)
        exact = _exact(linears[0], x, bias, matrix.gated)
        blas_s = _seconds([partial(linear, x) for linear in linears], device)
        best, best_s = None, GAIN * blas_s
        for plan in plans:
            try:
                error = float((linears[0].few_rows(x, plan).float() - exact).norm() / exact.norm())
                took_s = _seconds([partial(linear.few_rows, x, plan) for linear in linears], device)
            except Exception as failure:  # a plan may need more of a device than it has
                if isinstance(failure, torch.AcceleratorError):
                    raise
                continue
            if error <= MOST_ERROR and took_s < best_s:
                best, best_s = plan, took_s
        if best is not None:
            operations.plans.use(rows, linears[0].matrix, best)
            found.append(f"{matrix.name} x {rows}: {best_s * 1e6:.0f} of {blas_s * 1e6:.0f} µs, {tuple(best)}")
            plans = (best,)  # compiling is slow, and larger tiles behave alike
        else:
            found.append(f"{matrix.name} x {rows}: cuBLAS, {blas_s * 1e6:.0f} µs")
    return found


def _exact(linear: CudaLinear | CudaFp8Linear, x: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    """The result in float32, from the weights as they are kept."""
    y = F.linear(x.float(), linear.matrix.float())
    if linear.scales is not None:
        y *= linear.scales
    if bias is not None:
        y += bias.float()
    if not gated:
        return y
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _seconds(calls: list[Callable[[], object]], device: torch.device) -> float:
    """Seconds of one call. Calls run in a CUDA graph, one after another; elsewhere the time is that of the clock."""
    calls[0]()  # compiles the kernel
    if device.type != "cuda":
        return 1.0
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(ROUNDS):
            for call in calls:
                call()
    best = float("inf")
    for _ in range(TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best / 1000 / ROUNDS / len(calls)
