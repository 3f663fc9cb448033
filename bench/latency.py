"""python -m bench.latency: the latencies of running answers and of health probes under load.

pictures: text streams run, then many images arrive at once; measures the gaps between the streams' tokens.
probe: more requests than the server has slots, and a probe's question every half second; measures the time to the
probe's first token, and the latency of /health.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench import servers
from bench.checkpoint import DEFAULT_CACHE, build_mid
from bench.client import Address, Sample, ask
from bench.report import percentile
from bench.workloads import WORKLOADS, converse, question, turns
from models.shapes.checkpoint import FOLDER as DEMO

STREAM_TOKENS = 200  # for each request of a stream
PACE_LIMIT = 3.0  # times the unloaded gap between tokens
PROBE_LIMIT_S = 2.0
PROBE_EVERY_S = 0.5


@dataclass(frozen=True)
class Window:
    begin: float
    end: float

    def has(self, moment: float) -> bool:
        return self.begin <= moment <= self.end


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["pictures", "probe"])
    parser.add_argument("--model", type=Path, help="default: the mid shape for pictures, the demo for probe")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--dtype", help="default: bfloat16 for the mid shape, float32 for the demo")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="GLM_X=VALUE", help="a setting of the server")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration, unloaded or under saturation")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--arrivals", type=int, default=16)
    given = parser.parse_args(arguments)
    demo = given.mode == "probe"
    folder = given.model or (DEMO if demo else build_mid(given.cache))
    settings = dict(item.split("=", 1) for item in given.set)
    dtype = given.dtype or ("float32" if demo else "bfloat16")
    if demo:
        settings["GLM_PROBE_TOKEN"] = servers.PROBE_TOKEN
    with servers.this(folder, dtype, given.device, **settings) as server:
        if demo:
            return asyncio.run(saturate(server.address, given.arrivals * 2, given.seconds))
        return asyncio.run(interrupt(server.address, given.streams, given.arrivals, given.seconds))


# Images arrive while text streams run.


async def interrupt(address: Address, streams: int, arrivals: int, seconds: float) -> int:
    samples: list[Sample] = []
    conversations = [turns(WORKLOADS["B"], f"picture {number}") for number in range(arrivals)]
    async with address.client() as client:
        await converse(client, address, turns(WORKLOADS["B"], "warm-up"), 8)
        tasks = [asyncio.create_task(_stream(client, address, number, samples)) for number in range(streams)]
        await asyncio.sleep(seconds / 4)  # until the prompts are prefilled
        alone = Window(time.perf_counter(), time.perf_counter() + seconds)
        await asyncio.sleep(seconds)
        began = time.perf_counter()
        answered = await asyncio.gather(*(converse(client, address, conversation) for conversation in conversations))
        loaded = Window(began, time.perf_counter())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    images = [sample for conversation in answered for sample in conversation]
    # Until the last image is prefilled; afterwards only the batch is larger.
    arriving = Window(began, max(s.moments[0] for s in images if s.moments))
    print(f"{streams} text streams, then {arrivals} images at once; gaps between a stream's tokens")
    base = _gaps("alone", samples, alone)
    ratio = _gaps("images arriving", samples, arriving) / base
    _gaps("until the last answer", samples, loaded)
    ttft = [s.ttft_s for s in images if s.moments]
    failed = sum(s.error is not None for s in (*samples, *images))
    print(f"images: TTFT p50 {percentile(ttft, 0.5):.2f} s, p95 {percentile(ttft, 0.95):.2f} s; errors {failed}")
    print(f"p95 while images arrive: {ratio:.2f} times that alone (limit {PACE_LIMIT:g})")
    return 0 if ratio <= PACE_LIMIT and not failed else 1


async def _stream(client: httpx.AsyncClient, address: Address, number: int, samples: list[Sample]) -> None:
    """One request after another; a sample is in the list while it is still being filled."""
    rng = random.Random(f"stream {number}")
    while True:
        sample = Sample(time.perf_counter())
        samples.append(sample)
        messages = [{"role": "user", "content": question(rng, 32)}]
        await ask(client, address, messages, STREAM_TOKENS, sample=sample)


def _gaps(name: str, samples: list[Sample], window: Window) -> float:
    """Prints and returns the 95th percentile."""
    gaps = list(_between(samples, window))
    p95 = percentile(gaps, 0.95) or float("nan")
    print(
        f"  {name}: {len(gaps)} gaps, p50 {percentile(gaps, 0.5) or 0:.3f} s, p95 {p95:.3f} s, max {max(gaps):.3f} s"
    )
    return p95


def _between(samples: list[Sample], window: Window) -> Iterator[float]:
    for sample in samples:
        for before, after in zip(sample.moments, sample.moments[1:], strict=False):
            if window.has(after):
                yield after - before


# A probe's question under saturation.


async def saturate(address: Address, parallel: int, seconds: float) -> int:
    until = time.perf_counter() + seconds
    refused: list[Sample] = []

    async def client_of_load(number: int) -> None:
        workload = WORKLOADS["B" if number % 2 else "A"]
        async with address.client() as client:
            for turn in itertools.takewhile(lambda _: time.perf_counter() < until, itertools.count()):
                conversation = turns(workload, f"crowd {number} {turn}")
                refused.extend(s for s in await converse(client, address, conversation, STREAM_TOKENS) if s.error)

    async def health() -> list[float]:
        times = []
        async with address.client() as client:
            while time.perf_counter() < until:
                began = time.perf_counter()
                (await client.get("/health")).raise_for_status()
                times.append(time.perf_counter() - began)
                await asyncio.sleep(0.1)
        return times

    async def probes() -> list[Sample]:
        await asyncio.sleep(2.0)
        samples: list[Sample] = []
        probing = Address(address.url, address.model, servers.PROBE_TOKEN, {"X-GLM-Probe": servers.PROBE_TOKEN})
        async with probing.client() as client:
            while time.perf_counter() < until:
                samples += await converse(client, probing, turns(WORKLOADS["B"], f"probe {len(samples)}"), 8)
                await asyncio.sleep(PROBE_EVERY_S)
        return samples

    load = asyncio.gather(*(client_of_load(number) for number in range(parallel)))
    samples, times = await asyncio.gather(probes(), health())
    await load
    errors = [s.error for s in samples if s.error]
    ttft = [s.ttft_s for s in samples if not s.error]
    p95 = percentile(ttft, 0.95) or float("inf")
    print(f"{parallel} requests all the time; {len(samples)} probes, each with a new image")
    print(f"probe TTFT: p50 {percentile(ttft, 0.5) or 0:.3f} s, p95 {p95:.3f} s (limit {PROBE_LIMIT_S:g}); {errors=}")
    print(f"/health: p50 {percentile(times, 0.5):.3f} s, p95 {percentile(times, 0.95):.3f} s, max {max(times):.3f} s")
    print(f"refused or failed requests of the load: {len(refused)} {sorted({str(s.error)[:80] for s in refused})[:3]}")
    return 0 if p95 < PROBE_LIMIT_S and not errors else 1


if __name__ == "__main__":
    sys.exit(main())
