"""python -m bench.memory: the server's resident memory over many short requests.

All prompts are new, and so is an image in every tenth request. The caches are so small that the first tenth of the
requests fills them; growth after that is a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

import httpx

from bench import servers
from bench.client import Address, ask
from bench.workloads import image_url, question
from models.shapes.checkpoint import FOLDER as DEMO

ANSWER_TOKENS = 4
LIMIT = 0.05  # of growth after the first tenth
SMALL_CACHES = {"GLM_CONTEXT_TOKENS": "1024", "GLM_KV_CACHE_BYTES": str(32 * 2**20), "GLM_PICTURE_CACHE_BYTES": str(2**20)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="GLM_X=VALUE", help="a setting of the server")
    given = parser.parse_args(arguments)
    settings = SMALL_CACHES | dict(item.split("=", 1) for item in given.set)
    with servers.this(given.model, given.dtype, given.device, **settings) as server:
        return asyncio.run(watch(server, given.requests, given.parallel))


async def watch(server: servers.Server, requests: int, parallel: int) -> int:
    numbers = iter(range(requests))
    marks = {round(requests * tenth / 10) for tenth in range(1, 11)}
    levels: list[tuple[int, int]] = []  # requests, resident bytes
    errors: list[str] = []
    done = 0
    began = time.perf_counter()

    async with server.address.client() as client:

        async def worker() -> None:
            nonlocal done
            for number in numbers:
                errors.extend(await _one(client, server.address, number))
                done += 1
                if done in marks:
                    levels.append((done, server.resident_bytes() or 0))
                    print(f"{done} requests: {levels[-1][1] / 2**20:.1f} MiB", flush=True)

        await asyncio.gather(*(worker() for _ in range(parallel)))
    first, most = levels[0][1], max(level for _, level in levels)
    growth = most / first - 1
    print(
        f"{requests} requests in {time.perf_counter() - began:.0f} s, {len(errors)} errors {errors[:2]}: "
        f"{first / 2**20:.1f} MiB after the first tenth, {most / 2**20:.1f} MiB at most ({growth:+.2%})"
    )
    return 0 if growth <= LIMIT and not errors else 1


async def _one(client: httpx.AsyncClient, address: Address, number: int) -> list[str]:
    rng = random.Random(f"memory {number}")
    content: list[dict[str, object]] = [{"type": "text", "text": question(rng, 8)}]
    if number % 10 == 0:
        content.insert(0, {"type": "image_url", "image_url": {"url": image_url(rng, 112)}})
    sample = await ask(client, address, [{"role": "user", "content": content}], ANSWER_TOKENS)
    return [sample.error] if sample.error and sample.error != "no text" else []


if __name__ == "__main__":
    sys.exit(main())
