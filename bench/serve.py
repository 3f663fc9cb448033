"""python -m bench.serve: the usual way, this server and any other, side by side on the same machine.

Every round starts each server in turn and drives it with the same requests; nothing else of the
benchmark runs meanwhile. Ratios are taken within a round, because a machine's speed drifts. Rounds are
appended to the results file, so a later run adds to an earlier one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil

from bench import servers
from bench.checkpoint import DEFAULT_CACHE, build_mid
from bench.report import Cell, Results, summarise
from bench.workloads import ANSWER_TOKENS, WORKLOADS, drive

NAIVE, THIS = "a: generate", "b: this server"
FEWEST = 3  # conversations in a cell


@dataclass(frozen=True)
class Contender:
    name: str
    start: Callable[[], AbstractContextManager[servers.Server]]
    most_parallel: int
    waves: int  # conversations for each of those in parallel


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    folder = given.model or build_mid(given.cache)
    contenders = choose(given, folder)
    with given.results.open("a", encoding="utf-8") as results:
        for number in range(given.rounds):
            name = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{number}"
            for contender in contenders:
                for cell in measure(contender, name, given.workloads, given.parallel, given.tokens):
                    print(json.dumps(asdict(cell)), file=results, flush=True)
                    print(f"{cell.server} {cell.workload} x{cell.parallel}: {cell.tokens_per_s:.1f} tokens/s")
    report(given.results, given.plot)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="0 only shows the results file")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--parallel", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=ANSWER_TOKENS, help="length of every answer")
    parser.add_argument("--waves", type=int, default=2, help="conversations for each of those in parallel")
    parser.add_argument(
        "--naive-parallel", type=int, default=4, help="(a) answers one at a time: more in parallel only wait longer"
    )
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="another server; may be repeated"
    )
    parser.add_argument("--url-key", default="none", help="API key of those servers")
    parser.add_argument("--url-model", help="model name that those servers want")
    parser.add_argument("--without", action="append", default=[], choices=["a", "b"], help="leave a server out")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the mid shape, built once")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where the mid shape is kept")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="GLM_X=VALUE", help="a setting of (b)")
    parser.add_argument("--results", type=Path, default=Path("bench-results.jsonl"), help="a line for every cell")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    return parser.parse_args(arguments)


def choose(given: argparse.Namespace, folder: Path) -> list[Contender]:
    settings = dict(item.split("=", 1) for item in given.set)
    highest = max(given.parallel)
    found = []
    if "a" not in given.without:
        start = partial(servers.naive, folder, given.dtype, given.device)
        found.append(Contender(NAIVE, start, given.naive_parallel, 1))
    if "b" not in given.without:
        start = partial(servers.this, folder, given.dtype, given.device, **settings)
        found.append(Contender(THIS, start, highest, given.waves))
    for item in given.url:
        name, _, url = item.partition("=")
        start = partial(servers.running, url, given.url_key, given.url_model)
        found.append(Contender(f"c: {name}", start, highest, given.waves))
    return found


def measure(
    contender: Contender, round_name: str, names: list[str], parallel: list[int], tokens: int
) -> Iterator[Cell]:
    with contender.start() as server:
        for name in names:
            workload = WORKLOADS[name]
            # Set-up that only the first request of a kind pays is no part of a steady rate.
            asyncio.run(drive(server.address, workload, 1, 1, f"{round_name} warm-up {name}", tokens=8))
            for count in parallel:
                if count > contender.most_parallel:
                    continue
                conversations = max(contender.waves * count, 1 if workload.turns > 1 else FEWEST)
                seed = f"{round_name} {name} {count}"
                samples = asyncio.run(drive(server.address, workload, count, conversations, seed, tokens))
                for error in {s.error for s in samples if s.error}:
                    print(f"{contender.name} {name} x{count}: {error}", file=sys.stderr)
                yield summarise(samples, round_name, contender.name, name, count, server.peak_bytes())


def report(results: Path, plot: Path | None) -> None:
    cells = [Cell(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]
    found = Results(cells, NAIVE)
    print(f"\n{machine()}; {found.rounds} rounds, medians; ratio: median (lowest-highest) within a round\n")
    print(found.table())
    if plot:
        found.plot(plot)
        print(f"\nplot: {plot}")


def machine() -> str:
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    named = re.search(r"^model name\s*: (.+)$", described, re.MULTILINE)
    model = named[1] if named else platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model}, {memory:.0f} GiB, {platform.system()} {platform.release()}"


if __name__ == "__main__":
    sys.exit(main())
