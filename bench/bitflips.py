"""python -m bench.bitflips: what share of flipped bits one round of the engine's guard finds, and by which stage.

Each flip is one random bit of one random weight, chosen by size; the fingerprint is computed, then the sums of the
weights, and the bit is flipped back. `--soak S` does the opposite: nothing is flipped, the engine answers requests and
compares itself as often as it can for S seconds, and every difference is a false alarm.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from api.engine.config import EngineConfig
from api.engine.engine import Engine
from api.engine.guard import WEIGHTS
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.model.weights import raw_bytes, weights_of
from api.engine.request import Delta, Failed, Request, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = "not found"
PAUSE_S = 0.3  # between two requests of the soak, so that the engine is idle now and then


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bitflips", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "shapes"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=46)
    parser.add_argument("--soak", type=float, default=0.0, metavar="S", help="seconds without flips, with requests")
    given = parser.parse_args(arguments)
    config = EngineConfig(model=given.model, dtype=given.dtype, root=ROOT, fingerprint_s=0.2 if given.soak else 600.0)
    model = load(config, lambda fraction: None)
    result = soak(model, given.soak) if given.soak else flips(model, given.flips, random.Random(given.seed))
    facts = {name: model.facts[name] for name in ("device", "dtype", "kernels", "threads")}
    print(json.dumps({"model": model.id, **facts, **result}, indent=2))
    return 0


@torch.inference_mode()
def flips(model: Model, count: int, rng: random.Random) -> dict[str, object]:
    integrity = model.integrity
    assert integrity is not None
    weights = [(name, raw_bytes(tensor), tensor.dtype.itemsize) for name, tensor in weights_of(model.runner)]
    integrity.fingerprint(lambda: False)
    began = time.monotonic()
    first = integrity.fingerprint(lambda: False) or {}
    fingerprint_s = time.monotonic() - began
    began = time.monotonic()
    sums = dict(integrity.weight_sums())
    sums_s = time.monotonic() - began
    found: Counter[str] = Counter()
    unseen_bits: Counter[int] = Counter()
    missed_by_sums = 0
    for _ in range(count):
        _, memory, size = rng.choices(weights, [len(m) for _, m, _ in weights])[0]
        byte, bit = rng.randrange(len(memory)), rng.randrange(8)
        memory[byte] ^= 1 << bit
        taken = integrity.fingerprint(lambda: False) or {}
        stage = next((stage for stage, digest in first.items() if taken.get(stage) != digest), "")
        differ = dict(integrity.weight_sums()) != sums
        memory[byte] ^= 1 << bit
        found[stage or (WEIGHTS if differ else UNSEEN)] += 1
        missed_by_sums += not differ
        if not stage:
            unseen_bits[byte % size * 8 + bit] += 1
    assert integrity.fingerprint(lambda: False) == first, "a bit was not flipped back"
    return {
        "weight_bytes": sum(len(memory) for _, memory, _ in weights),
        "fingerprint_s": round(fingerprint_s, 4),
        "sums_s": round(sums_s, 4),
        "flips": count,
        "found": count - found[UNSEEN],
        "first_found_by": dict(found.most_common()),
        "found_by_the_sums_alone": count - missed_by_sums,
        "bits_that_no_stage_of_the_forward_pass_shows": dict(sorted(unseen_bits.items())),
    }


def soak(model: Model, seconds: float) -> dict[str, object]:
    engine = Engine(lambda progress: model, 64)
    engine.start()
    while engine.stats().state == "loading":
        time.sleep(0.01)
    end, asked, failed, alarms, rounds, last_age = time.monotonic() + seconds, 0, 0, 0, 0, float("inf")
    rng = random.Random(1)
    while time.monotonic() < end:
        inboxes = []
        for _ in range(rng.choice((1, 1, 4, 12))):
            text = f"What is {rng.randrange(100)}? " * rng.randrange(1, 12)
            rendered = model.template.render([{"role": "user", "content": text}], None, False)
            inboxes.append(queue.Queue())
            ids = tuple(model.vocabulary.encode(rendered))
            sampling = SamplingParams(max_tokens=rng.randrange(4, 60), temperature=rng.choice((0.0, 1.0)))
            engine.submit(Request(f"{asked}", ids, sampling), inboxes[-1].put)
            asked += 1
        for inbox in inboxes:
            while isinstance(event := inbox.get(), Delta):
                pass
            failed += isinstance(event, Failed)
        for _ in range(6):
            time.sleep(PAUSE_S / 6)
            report = engine.guard_report()
            age = report["fingerprint_age_s"]
            if age is not None:
                rounds += age < last_age
                last_age = age
            alarms += report["fingerprint"] == "differs"
    report = engine.guard_report()
    engine.stop(10)
    return {"seconds": seconds, "requests": asked, "failed": failed, "fingerprints_seen": rounds, "false_alarms": alarms, **report}


if __name__ == "__main__":
    sys.exit(main())
