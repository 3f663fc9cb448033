"""Times both implementations of each product by rows, and of each attention by kind, on this very machine.

They take turns, with random numbers in the model's shapes. The times are cached beside the library, so that every start on a
machine makes the same choice of them (choice.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch

from api.engine.kernels.build import PAGE_TOKENS
from api.engine.kernels.choice import ROWS, Choice, ModelShape, Times, decide, default_choice
from api.engine.kernels.operations import PANEL, CompiledOperations, PackedLinear
from api.engine.model.linear import Linear, TorchLinear
from api.engine.model.operations import AttentionMetadata, TorchOperations

# Larger matrices are tried with a part of their features: what a feature costs does not depend on their number.
MOST_NUMBERS = 2**23
MOST_ROUNDS, FEWEST_ROUNDS = 9, 5
LIMIT_S = 4.0  # for all of it: a busy machine that cannot do FEWEST_ROUNDS keeps the defaults and is tried at the next start
FORMAT = 1  # of the cached times


def choose(shape: ModelShape, library: Path, free_bytes: int, steady: bool) -> Choice:
    """The choice for a model in these shapes, by the threads that torch has now; `library` has been loaded. `steady` and
    `free_bytes` are those of `decide`."""
    file = library.with_name(f"{library.stem}-{_digest(shape)}.times")
    times = _cached(file)
    if times is None:
        times = measure(shape, LIMIT_S)
        if times is None:
            return default_choice(f"not known: {FEWEST_ROUNDS} rounds took longer than {LIMIT_S:g} s, see the next start")
        _store(file, times)
    return decide(shape, times, free_bytes, steady)


@torch.inference_mode()
def measure(shape: ModelShape, limit_s: float) -> dict[str, Times] | None:
    """Time both implementations in turns, round after round, each round through all shapes as a pass of the model does: so
    weights come from where they come from in a pass, and a disturbance changes few figures. None if it takes too long."""
    deadline = time.monotonic() + limit_s
    trials = []
    for trial in (*_products(shape), *_attentions(shape)):
        trial.compare()  # with the first call of each, which is not measured
        trials.append(trial)
        if time.monotonic() > deadline:
            return None
    rounds = 0
    for number in range(MOST_ROUNDS):
        took: dict[tuple[str, int], list[float]] = {}
        for rows in (*ROWS, 0):
            for which in (0, 1) if number % 2 else (1, 0):
                for trial in trials:
                    if rows not in trial.rows:
                        continue
                    if time.monotonic() > deadline:
                        return _times(trials) if rounds >= FEWEST_ROUNDS else None
                    began = time.perf_counter()
                    trial.run(which, rows)
                    took.setdefault((trial.name, rows), [0.0, 0.0])[which] = time.perf_counter() - began
        for trial in trials:
            for rows in trial.rows:
                ours, theirs = took[trial.name, rows]
                trial.seconds[rows].append((ours, theirs))
        rounds += 1
    return _times(trials)


class _Trial:
    """`run(0 for compiled or 1 for torch, rows)` computes; `rows` is (0,) for an attention. Of each number of rows, the first
    row is the same."""

    def __init__(self, name: str, rows: tuple[int, ...], run: Callable[[int, int], torch.Tensor]) -> None:
        self.name, self.rows, self.run = name, rows, run
        self.error = 0.0  # relative, between the two
        self.steady = [True, True]  # whether a row is the same among any rows: compiled, torch
        self.seconds: dict[int, list[tuple[float, float]]] = {each: [] for each in rows}

    def compare(self) -> None:
        found = [[self.run(which, rows) for rows in self.rows] for which in (0, 1)]
        for ours, theirs in zip(*found, strict=True):
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-9))
            self.error = max(self.error, error if error == error else float("inf"))
        self.steady = [all(torch.equal(each[0], results[0][0]) for each in results) for results in found]


def _products(shape: ModelShape) -> Iterator[_Trial]:
    generator = torch.Generator().manual_seed(46)
    numbers = torch.randn(MOST_NUMBERS // 8, generator=generator).to(torch.bfloat16)
    for product in shape.products:
        features, inputs, gated = product.key
        if features % PANEL or inputs % 2:
            continue  # always torch's
        some = min(features, max(MOST_NUMBERS // inputs // PANEL, 1) * PANEL)
        count = some * inputs
        weight = numbers.repeat(-(-count // len(numbers)))[:count].view(some, inputs) * inputs**-0.5
        both = PackedLinear(weight, None, gated), TorchLinear(weight, None, gated)
        x = torch.randn(max(product.rows), inputs, generator=generator).to(torch.bfloat16)
        yield _Trial(product.name, product.rows, partial(_multiply, both, x))


def _multiply(both: tuple[Linear, Linear], x: torch.Tensor, which: int, rows: int) -> torch.Tensor:
    return both[which](x[:rows])


def _attentions(shape: ModelShape) -> Iterator[_Trial]:
    both = CompiledOperations(Choice(0)), TorchOperations(PAGE_TOKENS)
    generator = torch.Generator().manual_seed(47)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(torch.bfloat16)

    rows, held, heads = 8, 12, shape.heads + 2 * shape.kv_heads
    kv = random(rows * held * PAGE_TOKENS, 2 * shape.kv_heads, shape.head_dim)
    pages = torch.randperm(rows * held, generator=generator)
    tokens = held * PAGE_TOKENS
    decode = AttentionMetadata(0, rows, pages.view(rows, held), None, torch.full((rows,), tokens - 3))
    qkv = random(rows, heads, shape.head_dim)
    yield _Trial("attention decode", (0,), lambda which, _: both[which].attend_decode(qkv, kv, decode))

    first = 4 * PAGE_TOKENS
    prefill = AttentionMetadata(0, tokens - first, pages[:held], None, first=first)
    chunk = random(tokens - first, heads, shape.head_dim)
    yield _Trial("attention prefill", (0,), lambda which, _: both[which].attend_prefill(chunk, kv, prefill))

    patches, count = 576, shape.picture_heads
    angles = torch.rand(patches, shape.picture_head_dim, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    picture = random(patches, 3 * count * shape.picture_head_dim)
    yield _Trial("attention picture", (0,), lambda which, _: both[which].attend_image(picture, cos, sin, 1, count))


def _times(trials: list[_Trial]) -> dict[str, Times]:
    result = {}
    for trial in trials:
        times = Times(list(trial.rows), [], [], [], [], trial.error, trial.steady)
        for pairs in trial.seconds.values():
            ratios = [theirs / ours for ours, theirs in pairs]
            times.compiled.append(1000 * min(ours for ours, _ in pairs))
            times.torch.append(1000 * min(theirs for _, theirs in pairs))
            times.faster.append(median(ratios))
            times.agreed.append(sum((ratio > 1) == (times.faster[-1] > 1) for ratio in ratios) / len(ratios))
        result[trial.name] = times
    return result


def _digest(shape: ModelShape) -> str:
    parts = repr((FORMAT, shape, torch.get_num_threads()))
    return hashlib.blake2b(parts.encode(), digest_size=6).hexdigest()


def _cached(file: Path) -> dict[str, Times] | None:
    try:
        return {name: Times(**times) for name, times in json.loads(file.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _store(file: Path, times: dict[str, Times]) -> None:
    unfinished = file.with_name(f"{file.name}-{os.getpid()}")
    try:
        unfinished.write_text(json.dumps({name: asdict(each) for name, each in times.items()}), "utf-8")
        unfinished.replace(file)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a full disk costs the next start its trial, not this one
