"""python -m bench.steps: the time of forward passes in this process, without HTTP, and of their operations.

Measures the mid shape: the matrix products by rows, decode steps by batch size, prompts, an image. Torch and the compiled
kernels alternate, because a machine's speed drifts. Also prints the operations that take most of the time, by
torch.profiler. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from api.engine import process
from api.engine.config import EngineConfig
from api.engine.kv_cache import KvCache
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.model.vision_encoder import VisionEncoder
from api.engine.request import Request, SamplingParams
from api.engine.scheduler import Batch, Chunk
from api.engine.sequence import Sequence, make_sequence
from api.engine.text.output import OutputState
from bench.checkpoint import DEFAULT_CACHE, build_mid

PROMPT_TOKENS = 70
GRID = (1, 24, 24)  # of an image of 336x336 pixels


class Steps:
    """Sequences that advance together, as in the engine."""

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
            assert sequence.block_table is not None and self._kv.append(sequence.block_table, len(sequence.keys))
        self._compute(sequences, Batch(tuple(sequences), chunks))

    def mixed(self, sequences: list[Sequence]) -> None:
        """A decode step with 16 tokens of another sequence's prompt."""
        new = self._sequence(len(sequences), PROMPT_TOKENS)
        self.decode(sequences, (Chunk(new, 16, 32),))
        self.end([new])

    def prefill_new(self, count: int, tokens: int) -> None:
        """Prefill new sequences, then free them."""
        sequences = self.prompts(count, tokens)
        self.prefill(sequences)
        self.end(sequences)

    def end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            assert sequence.block_table is not None
            self._kv.free(sequence.block_table, sequence.keys, keep=False)

    def _sequence(self, slot: int, tokens: int) -> Sequence:
        model = self._model
        ids = tuple(self._random.randrange(300, 1000) for _ in range(tokens))
        request = Request(f"{slot} {self._random.random()}", ids, SamplingParams(max_tokens=1000))
        sequence = make_sequence(request, lambda event: None, model.vocabulary.special[model.image_token])
        sequence.output = OutputState(request, model.vocabulary, model.end_ids, model.context_tokens)
        sequence.slot, sequence.block_table = slot, self._kv.allocate("", sequence.keys)
        model.runner.begin(sequence)
        return sequence

    def _compute(self, sequences: list[Sequence], batch: Batch) -> None:
        for sequence, sampled in zip(sequences, self._model.runner.compute(batch), strict=True):
            sequence.computed = len(sequence.keys)
            sequence.append(sampled.token)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the mid shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--times", type=int, default=10, help="measurements of each")
    given = parser.parse_args()
    process.keep_freed_memory()
    folder = given.model or build_mid(given.cache)
    models = {}
    for kernels in ("torch", "auto"):
        config = EngineConfig(model=str(folder), dtype=given.dtype, device="cpu", kernels=kernels, kv_cache_bytes=2**29)
        model = load(config, lambda fraction: None)
        model.runner.warm_up()
        models[model.facts["kernels"]] = model
    print(f"kernels: {model.facts['kernels']}, {model.facts['choices']['kernels']}")
    for rows in (1, 4, 13, 16, 32, 512):
        compare(f"products, {rows} rows", {name: products(model, rows) for name, model in models.items()}, given.times)
    running = {name: Steps(model) for name, model in models.items()}
    for rows in (1, 4, 16):
        batches = {name: steps.prompts(rows, PROMPT_TOKENS) for name, steps in running.items()}
        for name, steps in running.items():
            steps.prefill(batches[name])
        decode = {name: partial(steps.decode, batches[name]) for name, steps in running.items()}
        compare(f"decode, {rows} at once", decode, given.times)
        if rows == 16:
            mixed = {name: partial(steps.mixed, batches[name]) for name, steps in running.items()}
            compare("decode, 16 at once and 16 tokens of a prompt", mixed, given.times)
        for name, steps in running.items():
            steps.end(batches[name])
    for count, tokens in ((1, PROMPT_TOKENS), (4, PROMPT_TOKENS), (3, 165)):
        prefill = {name: partial(steps.prefill_new, count, tokens) for name, steps in running.items()}
        compare(f"prefill, {count} x {tokens} tokens", prefill, given.times // 2)
    compare("an image of 576 patches", {name: image(model) for name, model in models.items()}, given.times)
    return 0


def products(model: Model, rows: int) -> Callable[[], None]:
    """The matrix products of a pass, without the operations between them."""
    decoder = model.runner._decoder  # type: ignore[attr-defined]
    linears = list(decoder.linears())
    inputs = {size: torch.randn(rows, size, dtype=decoder.dtype) for size in {linear.in_features for linear in linears}}

    @torch.inference_mode()
    def work() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    return work


def image(model: Model) -> Callable[[], None]:
    encoder: VisionEncoder = model.runner._vision_encoder  # type: ignore[attr-defined]
    patches = torch.randn(GRID[1] * GRID[2], encoder.patch_size)

    @torch.inference_mode()
    def work() -> None:
        encoder.advance(encoder.begin(patches, GRID), float("inf"))

    return work


def compare(name: str, works: dict[str, Callable[[], None]], times: int) -> None:
    took: dict[str, list[float]] = {kernels: [] for kernels in works}
    for _ in range(times):
        for kernels, work in works.items():
            work()  # warms the caches, which the other kernels have used
            began = time.perf_counter()
            work()
            took[kernels].append(time.perf_counter() - began)
    medians = {kernels: median(seconds) for kernels, seconds in took.items()}
    figures = ", ".join(f"{kernels} {seconds * 1000:.1f} ms" for kernels, seconds in medians.items())
    ratios = [theirs / ours for theirs, ours in zip(*took.values(), strict=True)] if len(took) == 2 else []
    print(f"{name}: {figures}" + (f": {median(ratios):.2f} times as fast" if ratios else ""))
    for kernels, work in works.items():
        print(f"  {kernels}: {top_operations(work)}")


def top_operations(work: Callable[[], None]) -> str:
    """The operations that take most of the time, with their shares."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return ", ".join(f"{e.key.split('::')[-1]} {e.self_cpu_time_total / total:.0%}" for e in events[:5])


if __name__ == "__main__":
    sys.exit(main())
