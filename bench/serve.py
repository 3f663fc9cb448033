"""python -m bench.serve: compares the baseline, this server and any other on the same machine.

Each round starts one server after the other and drives it with the same requests; with --together all of them run, and take
turns at each cell. Ratios are taken within a round, because a machine's speed drifts. Rounds are appended to the results file,
so a later run adds to an earlier one.
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
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil

from bench import servers
from bench.checkpoint import DEFAULT_CACHE, build_mid
from bench.report import Cell, Results, summarise
from bench.workloads import ANSWER_TOKENS, WORKLOADS, drive

NAIVE, THIS = "a: generate", "b: this server"
MIN_CONVERSATIONS = 3  # of a cell with one turn each


@dataclass(frozen=True)
class Contender:
    name: str
    start: Callable[[], AbstractContextManager[servers.Server]]
    most_parallel: int
    waves: int  # conversations one after another, for each in parallel


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    folder = given.model or build_mid(given.cache)
    contenders = choose(given, folder)
    with given.results.open("a", encoding="utf-8") as results:
        for number in range(given.rounds):
            name = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{number}"
            cells = by_turns if given.together else one_after_another
            for cell in cells(contenders, name, number, given.workloads, given.parallel, given.tokens):
                print(json.dumps(asdict(cell)), file=results, flush=True)
                print(f"{cell.server} {cell.workload} x{cell.parallel}: {cell.tokens_per_s:.1f} tokens/s", flush=True)
    report(given.results, given.plot)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="0: only report the results file")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--parallel", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=ANSWER_TOKENS, help="length of every answer")
    parser.add_argument("--waves", type=int, default=2, help="conversations one after another, for each in parallel")
    parser.add_argument(
        "--naive-parallel", type=int, default=4, help="limit for (a), which answers one at a time"
    )
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="another server; may be repeated"
    )
    parser.add_argument("--together", action="store_true", help="all servers run, and take turns at each cell")
    parser.add_argument("--url-key", default="none", help="API key of those servers")
    parser.add_argument("--url-model", help="model name for those servers")
    parser.add_argument("--without", action="append", default=[], choices=["a", "b"], help="leave a server out")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the mid shape, built once")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the mid shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="GLM_X=VALUE", help="a setting of (b)")
    parser.add_argument("--results", type=Path, default=Path("bench-results.jsonl"), help="JSON lines, one for each cell")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    return parser.parse_args(arguments)


def choose(given: argparse.Namespace, folder: Path) -> list[Contender]:
    settings = dict(item.split("=", 1) for item in given.set)
    highest = max(given.parallel)
    contenders = []
    if "a" not in given.without:
        start = partial(servers.naive, folder, given.dtype, given.device)
        contenders.append(Contender(NAIVE, start, given.naive_parallel, 1))
    if "b" not in given.without:
        start = partial(servers.this, folder, given.dtype, given.device, **settings)
        contenders.append(Contender(THIS, start, highest, given.waves))
    for item in given.url:
        name, _, url = item.partition("=")
        start = partial(servers.running, url, given.url_key, given.url_model)
        contenders.append(Contender(f"c: {name}", start, highest, given.waves))
    return contenders


def one_after_another(
    contenders: list[Contender], round_name: str, number: int, names: list[str], parallel: list[int], tokens: int
) -> Iterator[Cell]:
    for contender in contenders:
        with contender.start() as server:
            for name in names:
                warm_up(server, round_name, name)
                for count in parallel:
                    if count <= contender.most_parallel:
                        yield measure(contender, server, round_name, name, count, tokens)


def by_turns(
    contenders: list[Contender], round_name: str, number: int, names: list[str], parallel: list[int], tokens: int
) -> Iterator[Cell]:
    """Each round begins with another server, so that none has the cooler machine every time."""
    first = number % len(contenders)
    order = contenders[first:] + contenders[:first]
    with ExitStack() as stack:
        running = [(contender, stack.enter_context(contender.start())) for contender in order]
        for name in names:
            for _, server in running:
                warm_up(server, round_name, name)
            for count in parallel:
                for contender, server in running:
                    if count <= contender.most_parallel:
                        yield measure(contender, server, round_name, name, count, tokens)


def warm_up(server: servers.Server, round_name: str, name: str) -> None:
    """The first request of a kind pays for set-up; it is not measured."""
    asyncio.run(drive(server.address, WORKLOADS[name], 1, 1, f"{round_name} warm-up {name}", tokens=8))


def measure(
    contender: Contender, server: servers.Server, round_name: str, name: str, count: int, tokens: int
) -> Cell:
    workload = WORKLOADS[name]
    conversations = max(contender.waves * count, 1 if workload.turns > 1 else MIN_CONVERSATIONS)
    seed = f"{round_name} {name} {count}"
    samples = asyncio.run(drive(server.address, workload, count, conversations, seed, tokens))
    for error in {s.error for s in samples if s.error}:
        print(f"{contender.name} {name} x{count}: {error}", file=sys.stderr)
    return summarise(samples, round_name, contender.name, name, count, server.peak_bytes())


def report(results: Path, plot: Path | None) -> None:
    cells = [Cell(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]
    collected = Results(cells, NAIVE)
    print(f"\n{machine()}; {collected.rounds} rounds, medians; ratio: median (lowest-highest) within a round\n")
    print(collected.table())
    for peer in collected.servers:
        if peer.startswith("c: ") and THIS in collected.servers:
            print(f"\ntokens/s of this server as a part of those of {peer[3:]}: median (lowest-highest) within a round\n")
            print(collected.matrix(THIS, peer))
    if plot:
        collected.plot(plot)
        print(f"\nplot: {plot}")


def machine() -> str:
    match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    model = match[1] if match else platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model}, {memory:.0f} GiB, {platform.system()} {platform.release()}"


if __name__ == "__main__":
    sys.exit(main())
