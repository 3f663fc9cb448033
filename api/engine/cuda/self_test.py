"""Proof at the start, on the very card that will serve: each fast path is compared with plain torch.

Both compute the same random inputs in the number format of the model, and plain torch computes them again in float64.
A path that raises, or is further from float64 than plain torch in the model's format would be, is switched off, and so is
one that is slower on the card: times are those of CUDA graphs, as in decoding. No kernel that was not right on this card answers a user.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from api.engine.cuda.operations import PATHS, CudaOperations, Path
from api.engine.cuda.shape import Shape
from api.engine.model.linear import Linear
from api.engine.model.operations import AttentionMetadata, Frames, Operations, TorchOperations
from api.engine.model.quantized_linear import NF4_BLOCK, Nf4Linear, bitsandbytes_ops
from api.engine.model.recipe import Format, Recipe
from api.engine.model.sampler import penalise_counts, penalise_seen

# Relative errors of up to this much are rounding in bfloat16; above it, plain torch's own error decides.
ROUNDING = 0.006
TOLERATED = 1.5  # times the error of plain torch
MAX_SLOWDOWN = 1.1  # a fast path must not be slower than this; less is noise
EXACT = torch.float64
TIMED_RUNS = 9
REPEATS = 20  # calls in one CUDA graph
LENGTHS = (1, 15, 16, 17, 255, 256, 257, 1000)  # tokens of decoding sequences: around the borders of pages and tiles
CHUNKS = ((0, 37), (16, 240), (219, 37), (220, 37), (700, 129))  # first token and rows of prompt chunks
IMAGES = (16, 196, 64, 420, 4)  # patches of frames that are encoded together
NEEDS_FORMAT: dict[Path, Format] = {"float8": "fp8", "nf4": "nf4"}  # of the text model; other paths are always needed
NF4_ROWS = (2, 17, 64, 16)
PENALTIES = ((1.0, 0.0, 0.0), (1.1, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.3), (1.3, -0.5, 0.2), (0.8, 0.0, 0.0))
EPS = 1e-5

Case = Callable[[Operations, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Proof:
    path: Path
    proven: bool
    reason: str


def prove(
    fast: CudaOperations, shape: Shape, device: torch.device, dtype: torch.dtype, paths: Iterable[Path] = PATHS
) -> list[Proof]:
    """One proof for each of the paths that the recipe needs. A lost device raises; everything else is a reason."""
    cases = _Cases(shape, device, dtype, fast.recipe)
    return [_prove(path, fast, cases) for path in paths if NEEDS_FORMAT.get(path) in (None, fast.recipe.text)]


def _prove(path: Path, fast: CudaOperations, cases: _Cases) -> Proof:
    plain = TorchOperations(cases.shape.page_tokens)
    worst = 0.0
    try:
        for case in cases.of(path):
            exact = case(plain, EXACT)
            found = case(fast, cases.dtype)
            expected = case(plain, cases.dtype)
            error, rounding = _error(found, exact), _error(expected, exact)
            worst = max(worst, error)
            if not error <= max(ROUNDING, TOLERATED * rounding):  # also if it is not a number
                return Proof(path, False, f"its relative error is {error:.4f}, plain torch's {rounding:.4f}")
        took_s, plain_s = (_seconds(partial(case, ops, cases.dtype), cases.device) for ops in (fast, plain))
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        return Proof(path, False, f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200] if str(error) else ''}")
    times = f"{took_s * 1e6:.0f} µs, plain torch {plain_s * 1e6:.0f}"
    if took_s > MAX_SLOWDOWN * plain_s:
        return Proof(path, False, f"it is slower: {times}")
    return Proof(path, True, f"relative error {worst:.4f}; {times}")


class _Cases:
    """Fixed random inputs for every path. A case computes them with given operations in a given number format."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, recipe: Recipe) -> None:
        self.shape, self.dtype, self.device, self._recipe = shape, dtype, device, recipe
        self._generator = torch.Generator(device).manual_seed(46)
        self._pages = -(-2 * max(LENGTHS) // shape.page_tokens)
        kv = self._random(self._pages * shape.page_tokens, 2 * shape.kv_heads, shape.head_dim)
        self._kv = {kind: kv.to(kind) for kind in (EXACT, dtype)}

    def of(self, path: Path) -> Iterator[Case]:
        return {
            "decode": self._decode, "prefill": self._prefill, "norms": self._norms,
            "rotation": self._rotation, "activation": self._activation, "image": self._image, "images": self._images,
            "penalties": self._penalties, "float8": self._float8, "nf4": self._nf4,
        }[path]()  # fmt: skip

    def _decode(self) -> Iterator[Case]:
        shape, rows = self.shape, len(LENGTHS)
        qkv = self._random(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        width = -(-max(LENGTHS) // shape.page_tokens)
        tables = torch.stack([self._table(width) for _ in LENGTHS])
        lengths = torch.tensor(LENGTHS, device=self.device)
        beyond = torch.arange(width * shape.page_tokens, device=self.device) >= lengths[:, None]

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            mask = None if isinstance(ops, CudaOperations) and not ops.needs_masks else self._mask(beyond, dtype)[:, None, None]
            metadata = AttentionMetadata(0, rows, tables, mask, lengths)
            return ops.attend_decode(qkv.to(dtype), self._kv[dtype], metadata)

        yield case

    def _prefill(self) -> Iterator[Case]:
        for first, rows in CHUNKS:
            yield self._chunk(first, rows)

    def _chunk(self, first: int, rows: int) -> Case:
        shape = self.shape
        pages = self._table(-(-(first + rows) // shape.page_tokens))
        qkv = self._random(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        slots = _slots(pages, first, rows, shape.page_tokens)
        keys = torch.arange(len(pages) * shape.page_tokens, device=self.device)
        later = keys > first + torch.arange(rows, device=self.device)[:, None]

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            kv = self._kv[dtype]
            kv.index_copy_(0, slots, qkv.to(dtype)[:, -kv.shape[1] :])
            masked = first and not isinstance(ops, CudaOperations)
            metadata = AttentionMetadata(0, rows, pages, self._mask(later, dtype) if masked else None, first=first)
            return ops.attend_prefill(qkv.to(dtype), kv, metadata)

        return case

    def _norms(self) -> Iterator[Case]:
        x, delta = (self._random(rows, self.shape.hidden) for rows in (33, 33))
        first, second = (1 + 0.2 * self._random(self.shape.hidden) for _ in range(2))

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            return torch.cat(ops.add_norm(x.to(dtype), delta.to(dtype), first.to(dtype), second.to(dtype), EPS))

        yield case

    def _rotation(self) -> Iterator[Case]:
        shape, rows = self.shape, 33
        qkv = self._random(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        angle = self._random(rows, 1, shape.head_dim).expand(-1, shape.heads + shape.kv_heads, -1)
        still = angle[:, : shape.kv_heads] * 0
        angles = torch.cat([angle, still], dim=1)
        slots = _slots(self._table(3), 5, rows, shape.page_tokens)

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            kv = self._kv[dtype].clone()
            turned = ops.rotate_store(qkv.to(dtype, copy=True), angles.cos().to(dtype), angles.sin().to(dtype), kv, slots)
            return torch.cat([turned.flatten(), kv.flatten()])

        yield case

    def _activation(self) -> Iterator[Case]:
        x = self._random(33, 2 * self.shape.inner)

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            if isinstance(ops, CudaOperations):
                return ops.activate(x.to(dtype))
            gate, up = x.to(dtype).chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        yield case

    def _image(self) -> Iterator[Case]:
        heads, head_dim, frames, patches = self.shape.image_heads, self.shape.image_head_dim, 2, 2 * 196
        qkv = self._random(patches, 3 * heads * head_dim)
        angles = self._random(patches, head_dim)
        cos, sin = angles.cos(), angles.sin()

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            return ops.attend_image(qkv.to(dtype), cos, sin, frames, heads)

        yield case

    def _images(self) -> Iterator[Case]:
        """Frames of several sizes."""
        heads, head_dim = self.shape.image_heads, self.shape.image_head_dim
        qkv = self._random(sum(IMAGES), 3 * heads * head_dim)
        angles = self._random(sum(IMAGES), head_dim)
        starts = torch.tensor([0, *accumulate(IMAGES)], dtype=torch.int32, device=self.device)

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            return ops.attend_images(qkv.to(dtype), angles.cos(), angles.sin(), Frames(IMAGES, starts), heads)

        yield case

    def _penalties(self) -> Iterator[Case]:
        """Rows with and without them, in slots of any order; the vocabulary is no multiple of anything."""
        rows, slots, size = len(PENALTIES), 2 * len(PENALTIES), 9 * 4096 + 77
        logits = self._random(rows, size)
        seen = torch.rand(slots, size, device=self.device, generator=self._generator) < 0.1
        counts = torch.randint(0, 4, (slots, size), dtype=torch.int16, device=self.device, generator=self._generator) * seen
        order = torch.randperm(slots, device=self.device, generator=self._generator)[:rows].int()
        repetition, presence, frequency = torch.tensor(PENALTIES, device=self.device).t().contiguous()

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            found = logits.to(EXACT if dtype == EXACT else torch.float32, copy=True)
            if isinstance(ops, CudaOperations) and ops.penalise is not None:
                ops.penalise(found, seen, counts, order, repetition, presence, frequency)
                return found
            found = penalise_seen(found, seen[order], repetition[:, None])
            return penalise_counts(found, counts[order], presence[:, None], frequency[:, None])

        yield case

    def _float8(self) -> Iterator[Case]:
        """Rows as long as those of the model, products with few outputs."""
        hidden, inner, few, rows = self.shape.hidden, self.shape.inner, 64, 33
        x, delta, narrow = self._random(rows, hidden), self._random(rows, hidden), self._random(rows, few)
        first, second = (1 + 0.2 * self._random(hidden) for _ in range(2))
        matrices = (self._random(few, hidden), self._random(2 * inner, few), self._random(few, inner))
        after, gate_up, down = ((matrix * matrix.shape[1] ** -0.5).to(self.dtype) for matrix in matrices)

        def linears(ops: Operations) -> tuple[Linear, Linear, Linear]:
            make = ops.linear if isinstance(ops, CudaOperations) else partial(self._recipe.linear, "text")
            return make(after, None, False), make(gate_up, None, True), make(down, None, False)

        made: Callable[[Any], tuple[Linear, Linear, Linear]] = cache(linears)

        def norm(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            norms = first.to(dtype), second.to(dtype)
            y, normed = ops.add_norm(x.to(dtype), delta.to(dtype), *norms, EPS, following=made(ops)[0])
            return torch.cat([y, made(ops)[0](normed)], dim=1)

        def mlp(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            gate_up, down = made(ops)[1:]
            return down(gate_up(narrow.to(dtype)))

        yield norm
        yield mlp

    def _nf4(self) -> Iterator[Case]:
        """Products of few rows: the last outputs of a matrix that is not much smaller than those of the model."""
        depth = self.shape.hidden
        weight = torch.randn(2 * depth, depth, dtype=self.dtype, device=self.device, generator=self._generator)
        known = Nf4Linear(weight)
        values, scales = (part.flatten() for part in known.parts)
        compared = min(256, depth)
        few = values[-compared * depth // 2 :], scales[-compared * depth // NF4_BLOCK :]
        last = bitsandbytes_ops().dequantize_4bit(*few, NF4_BLOCK, "nf4", (compared, depth), torch.float32)
        for rows in NF4_ROWS:
            yield self._nf4_rows(rows, weight, known, last)

    def _nf4_rows(self, rows: int, weight: torch.Tensor, known: Nf4Linear, last: torch.Tensor) -> Case:
        x = self._random(rows, weight.shape[1])
        linears: dict[Operations, Linear] = {}

        def case(ops: Operations, dtype: torch.dtype) -> torch.Tensor:
            if dtype == EXACT:
                return x @ last.to(EXACT).t()
            if ops not in linears:
                linears[ops] = ops.linear(weight) if isinstance(ops, CudaOperations) else known
            return linears[ops](x.to(dtype))[:, -len(last) :]

        return case

    def _random(self, *size: int) -> torch.Tensor:
        """Values that every number format has exactly."""
        return torch.randn(*size, device=self.device, generator=self._generator).to(self.dtype).to(EXACT)

    def _mask(self, masked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(masked.shape, dtype=dtype, device=self.device).masked_fill_(masked, -torch.inf)

    def _table(self, pages: int) -> torch.Tensor:
        """Pages in any order, as after hours of serving."""
        order = torch.randperm(self._pages, device=self.device, generator=self._generator)
        return order[:pages]


def _slots(pages: torch.Tensor, first: int, rows: int, page_tokens: int) -> torch.Tensor:
    index = torch.arange(first, first + rows, device=pages.device)
    return pages[index // page_tokens] * page_tokens + index % page_tokens


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, by norm; not a number where a result is not."""
    return float((found.to(EXACT) - exact).norm() / exact.norm())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a call after those that compile its kernels."""
    work()
    if device.type != "cuda":
        return median(_clocked(work) for _ in range(TIMED_RUNS))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()
    took = []
    for _ in range(TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1000 / REPEATS)
    return median(took)


def _clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
