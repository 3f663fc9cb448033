"""python -m bench.steps: what one forward pass costs in this process, without HTTP, and on what its time goes.

Prints for the mid shape: the matrix products alone by rows, a decode step by batch size, prompts, a picture; and the
operations that take most of each, by torch.profiler. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from api.engine.answer import Answer
from api.engine.kernels import CompiledOperations
from api.engine.kv_cache import KvCache
from api.engine.loader import load
from api.engine.model import Model
from api.engine.operations import TorchOperations
from api.engine.request import Request, Sampling
from api.engine.scheduler import Batch, Chunk
from api.engine.sequence import Sequence, make_sequence
from api.engine.vision import VisionTower
from bench.checkpoint import DEFAULT_CACHE, build_mid
from settings import Settings

PROMPT = 70
PICTURE = (1, 24, 24)  # 336x336


class Steps:
    """Requests that advance together, as the engine would advance them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._kv = KvCache(model.capacity.pages, model.capacity.page_tokens)
        self._random = random.Random(46)

    def prompts(self, count: int, tokens: int) -> list[Sequence]:
        return [self._sequence(slot, tokens) for slot in range(count)]

    def prefill(self, sequences: list[Sequence]) -> None:
        self._compute(sequences, Batch((), tuple(Chunk(s, 0, len(s.keys)) for s in sequences)))

    def decode(self, sequences: list[Sequence], chunks: tuple[Chunk, ...] = ()) -> None:
        for sequence in sequences:
            assert sequence.lease is not None and self._kv.grow(sequence.lease, len(sequence.keys))
        self._compute(sequences, Batch(tuple(sequences), chunks))

    def mixed(self, sequences: list[Sequence]) -> None:
        """With the second 16 tokens of somebody's prompt."""
        new = self._sequence(len(sequences), PROMPT)
        self.decode(sequences, (Chunk(new, 16, 32),))
        self.end([new])

    def end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            assert sequence.lease is not None
            self._kv.close(sequence.lease, sequence.keys, keep=False)

    def _sequence(self, slot: int, tokens: int) -> Sequence:
        model = self._model
        ids = tuple(self._random.randrange(300, 1000) for _ in range(tokens))
        request = Request(f"{slot} {self._random.random()}", ids, Sampling(max_tokens=1000))
        sequence = make_sequence(request, lambda event: None, model.vocabulary.special[model.image_token])
        sequence.answer = Answer(request, model.vocabulary, model.end_ids, model.context_tokens)
        sequence.slot, sequence.lease = slot, self._kv.open("", sequence.keys)
        model.runner.begin(sequence)
        return sequence

    def _compute(self, sequences: list[Sequence], batch: Batch) -> None:
        for sequence, choice in zip(sequences, self._model.runner.compute(batch), strict=True):
            sequence.computed = len(sequence.keys)
            sequence.append(choice.token)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the mid shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", default="auto", choices=["auto", "torch"])
    given = parser.parse_args()
    folder = given.model or build_mid(given.cache)
    model = load(Settings(model=str(folder), dtype=given.dtype, device="cpu", kernels=given.kernels), lambda fraction: None)
    model.runner.warm_up()
    while model.facts["kernels"] == "compiling":
        time.sleep(0.25)
    print(f"kernels: {model.facts['kernels']}, {model.facts['choices']['kernels']}")
    with torch.inference_mode():
        products(model)
    steps = Steps(model)
    for rows in (1, 4, 16):
        running = steps.prompts(rows, PROMPT)
        steps.prefill(running)
        both(model, f"decode, {rows} at once", lambda running=running: steps.decode(running))  # type: ignore[misc]
        if rows == 16:
            both(model, "decode, 16 at once and 16 tokens of a prompt", lambda running=running: steps.mixed(running))  # type: ignore[misc]
        steps.end(running)
    for count, tokens in ((1, PROMPT), (4, PROMPT), (3, 165)):
        waiting = iter([steps.prompts(count, tokens) for _ in range(5)])
        show(f"prefill, {count} x {tokens} tokens", lambda waiting=waiting: steps.prefill(next(waiting)), 3)  # type: ignore[misc]
    tower: VisionTower = model.runner._tower  # type: ignore[attr-defined]
    patches = torch.randn(PICTURE[1] * PICTURE[2], tower.patch_size)
    with torch.inference_mode():
        show("a picture of 576 patches", lambda: tower.advance(tower.begin(patches, PICTURE), float("inf")), 5)
    return 0


def products(model: Model) -> None:
    """Every matrix product of a pass, and nothing else."""
    linears = list(model.runner._decoder.linears())  # type: ignore[attr-defined]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    for rows in (1, 4, 16, 128, 512):
        dtype = model.runner._decoder.dtype  # type: ignore[attr-defined]
        inputs = {size: torch.randn(rows, size, dtype=dtype) for size in {linear.in_features for linear in linears}}
        took = _median(lambda inputs=inputs: [linear(inputs[linear.in_features]) for linear in linears], 5)  # type: ignore[misc]
        rate, read = 2 * weights * rows / took / 1e9, 2 * weights / took / 1e9
        print(f"products, {rows} rows: {took * 1000:.1f} ms, {rate:.0f} GFLOPS, {read:.1f} GB/s in bfloat16")


def both(model: Model, name: str, work: Callable[[], object]) -> None:
    show(name, work, 15)
    if model.facts["kernels"] == "compiled":
        compare(model, work, 12)


def compare(model: Model, work: Callable[[], object], times: int) -> None:
    """The same with the operations of torch and with the compiled ones, by turns: a machine's speed drifts."""
    decoder = model.runner._decoder  # type: ignore[attr-defined]
    found: dict[str, list[float]] = {"torch": [], "compiled": []}
    for _ in range(times):
        for name, operations in (("torch", TorchOperations(decoder.page_tokens)), ("compiled", CompiledOperations())):
            decoder.use(operations)
            work()  # what the other has left in the caches
            found[name].append(_median(work, 3))
    theirs, ours = median(found["torch"]), median(found["compiled"])
    print(f"  with torch's operations {theirs * 1000:.1f} ms, compiled {ours * 1000:.1f} ms: {theirs / ours:.2f} times as fast")


def show(name: str, work: Callable[[], object], times: int) -> None:
    work()
    took = _median(work, times)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    most = ", ".join(f"{e.key.split('::')[-1]} {e.self_cpu_time_total / whole:.0%}" for e in events[:6])
    print(f"{name}: {took * 1000:.1f} ms; {most}")


def _median(work: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found)


if __name__ == "__main__":
    sys.exit(main())
