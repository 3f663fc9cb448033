"""python -m bench.graphs_gpu: decode steps from CUDA graphs on a card, beside the same steps operation by operation.

In this process, without the engine's thread: what the device takes and what the host takes, which kernels take most, and
whether both ways give the same tokens. Random weights in the exact shape. `--dry` runs all of it in small on the CPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from api.engine.cuda.device import CudaDevice
from api.engine.cuda.graphs import Size
from api.engine.cuda.runner import CudaRunner
from api.engine.cuda.sampling import choose_tokens
from api.engine.encoder_cache import EncoderCache
from api.engine.kv_cache import KvCache
from api.engine.loaded_model import Capacity
from api.engine.model.recipe import make_recipe
from api.engine.model.runner import Glm4vRunner
from api.engine.model.sampler import Sampler
from api.engine.request import Request, SamplingParams
from api.engine.scheduler import EncodeTask, Scheduler
from api.engine.sequence import Sequence, make_sequence
from bench.gpu import CONTEXT, PAGE_TOKENS, Bench, operations, peak, timed
from bench.random_model import WordSource, image_of

SLOTS = 64
KERNELS_OF = (Size("decode", 1), Size("decode", 16), Size("decode", 65), Size("prompt", 64), Size("mixed", 512))


class Steps:
    """The engine's steps without its thread and its texts."""

    def __init__(self, runner: Glm4vRunner, capacity: Capacity, compute: Callable[..., Any]) -> None:
        self._runner, self._compute = runner, compute
        self._capacity = capacity
        self._random = random.Random(46)
        self.clear()

    def clear(self) -> None:
        size = self._capacity
        self.scheduler = Scheduler(999, size.slots, KvCache(size.pages, size.page_tokens), EncoderCache(0))

    def add(self, tokens: int, answer: int, **sampling: Any) -> Sequence:
        ids = tuple(self._random.randrange(300, 1000) for _ in range(tokens))
        sequence = make_sequence(Request(str(self._random.random()), ids, SamplingParams(answer, **sampling)), lambda event: None, -1)
        self.scheduler.add(sequence)
        return sequence

    def step(self, chunk_tokens: int = 512) -> None:
        for sequence in self.scheduler.admit():
            if sequence.block_table.copy:
                self._runner.copy_pages([sequence.block_table.copy])
            self._runner.begin(sequence)
        batch = self.scheduler.batch(chunk_tokens)
        tokens = self._compute(batch)
        self.scheduler.computed(batch)
        for sequence, sampled in zip(batch.sampled, tokens, strict=True):
            sequence.append(sampled.token)
            if len(sequence.output_ids) == sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)


def sampler(bench: Bench, runner: CudaRunner) -> None:
    rows, size = (8, 2048) if bench.dry else (64, runner.decoder.vocabulary_size)
    logits = torch.randn(rows, size, device=bench.device) * 3
    kinds = [{}, {"temperature": 0.8, "top_k": 2, "top_p": 0.6}, {"temperature": 1.1, "top_k": 50, "min_p": 0.02}]
    sequences = []
    for row in range(rows):
        one = Sequence(Request(str(row), (1,), SamplingParams(9, seed=row, **kinds[row % 3])), lambda event: None)
        one.slot = row
        sequences.append(one)
    twin = Sampler(rows, size, bench.device)
    for one in sequences:
        twin.begin(one)
    params = [one.request.sampling for one in sequences]
    arguments = [
        torch.tensor([p.temperature for p in params], device=bench.device),
        torch.tensor([max(p.top_k, 1) for p in params], dtype=torch.int32, device=bench.device),
        torch.tensor([p.top_p for p in params], device=bench.device),
        torch.tensor([p.min_p for p in params], device=bench.device),
    ]
    equal = total = 0
    for _ in range(20):
        numbers = twin.random_numbers(torch.arange(rows).numpy(), [len(s.output_ids) + 1 for s in sequences])
        ours = choose_tokens(logits, *arguments, torch.from_numpy(numbers).to(bench.device)).tolist()
        theirs = [sampled.token for sampled in twin.sample(logits, sequences)]
        equal += sum(a == b for a, b in zip(ours, theirs, strict=True))
        total += rows
        for one, token in zip(sequences, theirs, strict=True):
            one.append(token)
        logits = logits.roll(1, 0)
    again = torch.from_numpy(numbers).to(bench.device)
    figures = {}
    for name, work in {
        "all": lambda: choose_tokens(logits, *arguments, again),
        "one row": lambda: choose_tokens(logits[:1], *(a[:1] for a in arguments), again[:1]),
        "topk": lambda: logits.topk(64), "argmax": lambda: logits.argmax(-1), "sum": lambda: logits.sum(-1),
    }.items():  # fmt: skip
        figures[f"{name} us"] = round(median(timed(bench, work, 20)) * 1e6)
    bench.tell("sampler", rows=rows, equal=equal, of=total, **figures)


def same_tokens(bench: Bench, runner: CudaRunner, capacity: Capacity) -> None:
    """Arrivals and ends at random: greedy and sampled tokens by graphs, by the same operations, and by the plain runner."""

    def churn(compute: Callable[..., Any], graphs: bool) -> list[list[int]]:
        steps, rng = Steps(runner, capacity, compute), random.Random(3)
        saved = runner.graphs._replays
        runner.graphs._replays = saved if graphs else {}
        sequences = []
        for _ in range(40 if bench.dry else 150):
            if rng.random() < 0.3:
                sampling = rng.choice([{}, {"temperature": 0.8, "top_k": 2, "top_p": 0.6, "seed": len(sequences)}])
                sequences.append(steps.add(rng.choice((3, 14, 15, 16, 17, 100, 255, 256, 257)), rng.randrange(2, 60), **sampling))
            if steps.scheduler.has_work:
                steps.step()
        runner.graphs._replays = saved
        return [sequence.output_ids for sequence in sequences]

    answers = {
        "graphs": churn(runner.compute, True),
        "operations": churn(runner.compute, False),
        "plain": churn(lambda batch: Glm4vRunner.compute(runner, batch), False),
        "graphs again": churn(runner.compute, True),
    }
    for name in ("operations", "plain", "graphs again"):
        same = sum(a == b for a, b in zip(answers["graphs"], answers[name], strict=True))
        agreed = sum(next((n for n, p in enumerate(zip(a, b, strict=False)) if p[0] != p[1]), len(a)) for a, b in zip(answers["graphs"], answers[name], strict=True))
        bench.tell("same tokens", beside=name, answers_equal=same, of=len(answers["graphs"]), tokens_agree=agreed, tokens=sum(map(len, answers["graphs"])))


def decode(bench: Bench, runner: CudaRunner, capacity: Capacity) -> None:
    for rows in (1, 4) if bench.dry else (1, 2, 4, 8, 16, 32, 64):
        for length in (64,) if bench.dry else (64, 1000):
            steps = Steps(runner, capacity, runner.compute)
            for _ in range(rows):
                steps.add(length, 1000)
            while len(steps.scheduler.batch(0).decode) < rows:
                steps.step(2048)
            walls, hosts, devices = [], [], []
            for _ in range(5 if bench.dry else 40):
                batch = steps.scheduler.batch(0)
                began = time.perf_counter()
                flight = runner.launch(batch)
                hosts.append(time.perf_counter() - began)
                tokens = runner.collect(flight)
                walls.append(time.perf_counter() - began)
                devices.append(flight.finished.seconds_since(flight.began))
                steps.scheduler.computed(batch)
                for sequence, sampled in zip(batch.sampled, tokens, strict=True):
                    sequence.append(sampled.token)
            bench.tell(
                "decode step", rows=rows, length=length, wall_ms=round(median(walls) * 1e3, 3),
                host_ms=round(median(hosts) * 1e3, 3), device_ms=round(median(devices) * 1e3, 3),
            )  # fmt: skip


def kernels(bench: Bench, runner: CudaRunner) -> None:
    activities = [ProfilerActivity.CPU] if bench.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for size in runner.graphs.captured:
        if size not in KERNELS_OF and not bench.dry:
            continue
        with profile(activities=activities) as profiled:
            for _ in range(3):
                runner.graphs.replay(size)
            bench.wait()
        events = [e for e in profiled.key_averages() if bench.dry or e.self_device_time_total > 0]
        events.sort(key=lambda e: -(e.self_cpu_time_total if bench.dry else e.self_device_time_total))
        table = {e.key[:70]: (e.count // 3, round((e.self_cpu_time_total if bench.dry else e.self_device_time_total) / 3)) for e in events[:22]}
        bench.tell("kernels", size=size, count_and_us_a_step=table)


def prefill(bench: Bench, runner: CudaRunner, capacity: Capacity) -> None:
    for count, tokens in ((1, 64), (4, 64)) if bench.dry else ((1, 16), (1, 64), (1, 256), (1, 512), (4, 64), (4, 512)):
        walls, devices, hosts = [], [], []
        for _ in range(2 if bench.dry else 8):
            steps = Steps(runner, capacity, runner.compute)
            for _ in range(count):
                steps.add(tokens, 4)
            for sequence in steps.scheduler.admit():
                runner.begin(sequence)
            batch = steps.scheduler.batch(4096)
            began = time.perf_counter()
            flight = runner.launch(batch)
            hosts.append(time.perf_counter() - began)
            runner.collect(flight)
            walls.append(time.perf_counter() - began)
            devices.append(flight.finished.seconds_since(flight.began))
        bench.tell(
            "prefill", prompts=count, tokens=tokens, wall_ms=round(median(walls) * 1e3, 2),
            host_ms=round(median(hosts) * 1e3, 2), device_ms=round(median(devices) * 1e3, 2),
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.graphs_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="in small on the CPU")
    parser.add_argument("--out", type=Path, default=Path("graphs.jsonl"))
    given = parser.parse_args(arguments)
    bench = Bench(given.dry, given.out)
    slots, tokens = (4, 4096) if bench.dry else (SLOTS, SLOTS * 1280 + CONTEXT)
    capacity = Capacity(slots, tokens // PAGE_TOKENS, PAGE_TOKENS, 2048, 0)
    source = WordSource(bench.config(), bench.device, torch.bfloat16)
    began = time.perf_counter()
    runner = CudaRunner(source, capacity, CONTEXT, operations(bench, make_recipe("bf16")), device_of(bench))
    built_s = time.perf_counter() - began
    before = peak(bench)
    began = time.perf_counter()
    runner.warm_up()
    warm_s = time.perf_counter() - began
    began = time.perf_counter()
    while runner.prepare_next():
        pass
    bench.tell(
        "start", built_s=round(built_s, 1), warm_up_s=round(warm_s, 1), graphs_s=round(time.perf_counter() - began, 1),
        captured=runner.graphs.captured, off=runner.graphs.off, before=before, after=peak(bench),
    )  # fmt: skip
    failed = 0
    for section, work in {
        "decode": lambda: decode(bench, runner, capacity), "kernels": lambda: kernels(bench, runner),
        "sampler": lambda: sampler(bench, runner), "prefill": lambda: prefill(bench, runner, capacity),
        "vision": lambda: vision(bench, runner), "several images": lambda: several_images(bench, runner),
        "same tokens": lambda: same_tokens(bench, runner, capacity),
    }.items():  # fmt: skip
        try:
            work()
        except Exception as error:
            failed += 1
            bench.tell(section, failed=f"{type(error).__name__}: {error}")
            if runner.failure(error) == "device":
                raise
    return 1 if failed else 0


def vision(bench: Bench, runner: CudaRunner) -> None:
    """Images in slices: what the pace expects of each, beside what all of them take."""
    for side in (8, 12) if bench.dry else (24, 32, 64, 96):
        for limit_s in (1.0, 0.012):
            image = image_of((1, side, side), runner.vision_encoder.patch_size, side)
            for _ in range(2):
                bench.wait()
                began, task, slices, expected_s = time.perf_counter(), EncodeTask({("", b""): image}), 0, 0.0
                features = None
                while features is None:
                    features = runner.encode(task, limit_s)
                    slices, expected_s = slices + 1, expected_s + task.slice_s
                    host_s = time.perf_counter() - began
                    if limit_s < 1:
                        runner.wait_for_slices()
                runner.wait_for_slices()
                bench.wait()
                took_s = time.perf_counter() - began
            bench.tell(
                "vision", patches=side * side, limit_ms=limit_s * 1e3, slices=slices, expected_ms=round(expected_s * 1e3, 2),
                wall_ms=round(took_s * 1e3, 2), host_ms=round(host_s * 1e3, 2),
            )  # fmt: skip


def several_images(bench: Bench, runner: CudaRunner) -> None:
    """Small images of several sizes, encoded together and one by one."""
    for sides in ([8, 4],) if bench.dry else ([16] * 8, [8, 16, 24, 32]):
        tasks = {("", str(number).encode()): image_of((1, side, side), runner.vision_encoder.patch_size, side) for number, side in enumerate(sides)}
        took_ms = {}
        for name, groups in (("together", [tasks]), ("alone", [{key: image} for key, image in tasks.items()])):
            for _ in range(3):
                bench.wait()
                began = time.perf_counter()
                for group in groups:
                    task = EncodeTask(group)
                    while runner.encode(task, 1.0) is None:
                        pass
                runner.wait_for_slices()
                bench.wait()
                took_ms[name] = round((time.perf_counter() - began) * 1e3, 2)
        bench.tell("several images", sides=sides, **{f"{name}_ms": value for name, value in took_ms.items()})


def device_of(bench: Bench) -> Any:
    return DryDevice() if bench.dry else CudaDevice()


class _Now:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None: ...

    def done(self) -> bool:
        return True

    def seconds_since(self, earlier: Any) -> float:
        return self._at - earlier._at


class DryDevice:
    """Work runs at once on the CPU, and a graph is a function that is called again."""

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def send(self, source: torch.Tensor, place: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return source.to(dtype)

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def record(self) -> _Now:
        return _Now()

    def check(self) -> None: ...

    def release(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return torch.inference_mode()(work)


if __name__ == "__main__":
    sys.exit(main())
