"""python -m bench.fleet: what a fleet of cards finds in its caches, and how soon it answers, by how the router chooses.

A simulation, seeded: bench/fleet_replica.py says how a replica computes, bench/fleet_routers.py how routers choose. The
times are those of an H200 in docs/performance.md. `python -m bench.fleet_trial` compares it with two real replicas.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.fleet_chats import Traffic
from bench.fleet_replica import PrefixCache, Replica, Times
from bench.fleet_routers import Hash, LeastConnections, Random, Router
from bench.fleet_simulation import Fleet, Result

ROUTINGS = ("random", "least connections", "hash")

# The row "H200, bf16" of docs/performance.md, and what `python -m bench.gpu` asks for it.
STEPS_S = ((1, 5.79e-3), (4, 6.10e-3), (16, 6.02e-3), (64, 6.77e-3))  # by rows
TEXT, SMALL_PICTURE, LARGE_PICTURE = (60, 7.7e-3), (24 + 144, 23e-3), (24 + 1024, 58e-3)  # (prompt tokens, first token)


def fitted(text: tuple[int, float], small: tuple[int, float], large: tuple[int, float], steps: tuple[tuple[int, float], ...]) -> Times:
    """Through three measured first tokens, each as (prompt tokens, seconds): of a text, a small and a large picture.

    A token of text is given the price of an image token with its encoding, which is more than it costs.
    """
    token = (large[1] - small[1]) / (large[0] - small[0])
    prompt = text[1] - text[0] * token
    return Times(prompt, token, small[1] - small[0] * token - prompt, steps)


@dataclass(frozen=True)
class Card:
    name: str
    times: Times
    slots: int
    queue: int
    cache_tokens: int


# Slots and KV tokens: the memory plan of docs/model.md; the queue: `queue_for` of the scheduler.
H200 = Card("H200", fitted(TEXT, SMALL_PICTURE, LARGE_PICTURE, STEPS_S), 64, 128, 2_983_424)
SMALL_CACHE_TOKENS = 50_944  # of an RTX 3090 with bf16 weights, docs/model.md

# Assumptions: nobody's traffic was measured.
CHATS_PER_CARD_S = 2.0
TRAFFIC = Traffic(CHATS_PER_CARD_S, turns=4, pause_s=20.0, opening_tokens=1048, question_tokens=40, answer_tokens=128)
WARM_UP_S = 120.0  # longer than most chats, so that as many end as begin


@dataclass(frozen=True)
class Case:
    replicas: int
    routing: str
    measured_s: float
    card: Card = H200
    load: float = 1.0  # in CHATS_PER_CARD_S
    slow: int = 0  # replicas at a third of the speed
    warm_up_s: float = WARM_UP_S


# Fewer seconds where more replicas give more requests.
CASES = tuple(
    Case(replicas, routing, measured_s, warm_up_s=warm_up_s)
    for replicas, measured_s, warm_up_s in ((2, 600.0, WARM_UP_S), (10, 300.0, WARM_UP_S), (100, 30.0, WARM_UP_S), (1000, 8.0, 72.0))
    for routing in ROUTINGS
)
SMALL_CACHE = tuple(Case(10, routing, 300.0, replace(H200, cache_tokens=SMALL_CACHE_TOKENS), load=0.5) for routing in ROUTINGS)
STRAGGLERS = (*(Case(20, routing, 120.0, slow=1) for routing in ROUTINGS), Case(1, "hash", 120.0, slow=1))
SLOW_SPEED = 1 / 3


def routers(servers: list[str], seed: int) -> dict[str, Callable[[], Router]]:
    rng = random.Random(f"routing {seed}")
    return {
        "random": lambda: Random(len(servers), rng),
        "least connections": lambda: LeastConnections(len(servers), rng),
        "hash": lambda: Hash(servers),
    }


def run(case: Case, seed: int) -> Result:
    replicas = [Replica(case.card.times, case.card.slots, case.card.queue, PrefixCache(case.card.cache_tokens)) for _ in range(case.replicas)]
    for replica in replicas[: case.slow]:
        replica.speed = SLOW_SPEED
    servers = [f"10.0.{number // 250}.{number % 250 + 1}:8080" for number in range(case.replicas)]
    traffic = replace(TRAFFIC, chats_per_s=CHATS_PER_CARD_S * case.load * case.replicas)
    until_s = case.warm_up_s + case.measured_s
    fleet = Fleet(replicas, routers(servers, seed)[case.routing](), case.warm_up_s, until_s)
    return fleet.run(traffic.chats(seed, until_s + 60))  # the load goes on until the last that counts is answered


HEAD = (
    "| replicas | routing | prompt tokens cached | later turns that find their picture | first token p50 / p95 | later turns p95 "
    "| whole answer p95 | fullest replica | refused |\n| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def row(case: Case, result: Result) -> str:
    first = f"{result.first_s(0.5) * 1e3:.0f} / {result.first_s(0.95) * 1e3:.0f} ms"
    refused = f"{result.refused / max(result.requests + result.refused, 1):.1%}"
    return (
        f"| {case.replicas} | {case.routing} | {result.token_hits:.1%} | {result.turn_hits:.1%} | {first} | {result.later_first_s(0.95) * 1e3:.0f} ms "
        f"| {result.whole_s(0.95):.2f} s | {result.fullest:.2f} | {refused} |"
    )


def show(cases: tuple[Case, ...], seed: int) -> None:
    print(HEAD)
    for case in cases:
        print(row(case, run(case, seed)), flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1000, help="leave larger fleets out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=46, help="of the chats and of what routers draw (default: %(default)s)")
    options = parser.parse_args(words)
    print(f"A KV cache of {SMALL_CACHE_TOKENS:,} tokens, half the load:\n")
    show(SMALL_CACHE, options.seed)
    print(f"\nOne of {STRAGGLERS[0].replicas} replicas at a third of its speed, and that one by itself:\n")
    show(STRAGGLERS, options.seed)
    print("\nBy their number:\n")
    show(tuple(case for case in CASES if case.replicas <= options.most), options.seed)


if __name__ == "__main__":
    main()
