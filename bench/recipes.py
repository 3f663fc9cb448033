"""The demo model in every recipe, asked the questions of `models.shapes.eval` through the engine's own forward pass.

    python -m bench.recipes --seed 7 --each 20 [--device cuda] [--markdown]

Recipes: float32 and bf16 weights, float8 (emulated on a CPU), NF4, and NF4 with the vision encoder in 8 bits.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from api.engine.config import EngineConfig
from api.engine.encoder_cache import EncoderCache
from api.engine.kv_cache import KvCache
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.loading.safetensors_source import Checkpoint, SafetensorsSource
from api.engine.model.operations import TorchOperations
from api.engine.model.recipe import BF16, Recipe, make_recipe
from api.engine.model.runner import Glm4vRunner
from api.engine.model.weights import raw_bytes, weights_of
from api.engine.request import Request, SamplingParams
from api.engine.scheduler import Scheduler
from api.engine.sequence import make_sequence
from models.shapes.checkpoint import FOLDER
from models.shapes.eval import FLOORS, Trial, judge, trials

MAX_TOKENS = 160
WAITING = 1000
CHUNK_TOKENS = 512


class Variant(NamedTuple):
    name: str
    dtype: torch.dtype
    recipe: Recipe


VARIANTS = (
    Variant("float32", torch.float32, BF16),
    Variant("bf16", torch.bfloat16, BF16),
    Variant("fp8", torch.bfloat16, make_recipe("fp8")),
    Variant("nf4", torch.bfloat16, make_recipe("nf4")),
    Variant("nf4, vision int8", torch.bfloat16, make_recipe("nf4", True)),
    Variant("nf4, vision fp8", torch.bfloat16, make_recipe("nf4", True, (8, 9))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--each", type=int, default=20, help="trials of each family in each language")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    asked = list(trials(random.Random(f"eval/{options.seed}"), options.each))
    scores = {}
    for variant in VARIANTS:
        model = load_variant(options.model, options.device, variant)
        mib = sum(len(raw_bytes(tensor)) for _, tensor in weights_of(model.runner)) / 2**20
        scores[f"{variant.name} ({mib:.1f} MiB)"] = evaluate(model, asked, variant.name)
    report(scores, options.markdown)


def load_variant(folder: Path, device: str, variant: Variant) -> Model:
    """Loaded as always, then with a runner of this recipe."""
    config = EngineConfig(
        model=str(folder), device=device, dtype=str(variant.dtype).removeprefix("torch."), threads=1, slots=16,
        kernels="torch", weights="bf16",
    )  # fmt: skip
    model = load(config, lambda fraction: None)
    from transformers import AutoConfig

    source = SafetensorsSource(Checkpoint(folder, AutoConfig.from_pretrained(folder)), device, variant.dtype)
    operations = TorchOperations(model.capacity.page_tokens, variant.recipe)
    runner = Glm4vRunner(source, model.capacity, model.context_tokens, operations)
    source.close()
    return replace(model, runner=runner)


def evaluate(model: Model, asked: list[Trial], name: str) -> dict[str, list[float]]:
    """Scores by family."""
    scores: dict[str, list[float]] = defaultdict(list)
    batch = model.capacity.slots
    for start in tqdm(range(0, len(asked), batch), desc=name, mininterval=5):
        part = asked[start : start + batch]
        for trial, raw in zip(part, answers(model, part), strict=True):
            score, well_formed = judge(trial, raw)
            scores[trial.score].append(score)
            scores["format"].append(float(well_formed))
            if trial.score == "json":
                scores["json exact"].append(float(trial.question.answer in raw))
    return scores


def answers(model: Model, asked: list[Trial]) -> list[str]:
    """The generated texts with their special tokens, all computed together."""
    size = model.capacity
    scheduler = Scheduler(
        WAITING, size.slots, KvCache(size.pages, size.page_tokens), EncoderCache(size.encoder_cache_bytes)
    )
    image_id = model.vocabulary.special[model.image_token]
    sequences = [make_sequence(request_for(model, trial, image_id), _ignore, image_id) for trial in asked]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        step(model, scheduler)
    tokenizer: Any = model.template._tokenizer  # type: ignore[attr-defined]
    return [tokenizer.decode(sequence.output_ids, skip_special_tokens=False) for sequence in sequences]


def step(model: Model, scheduler: Scheduler) -> None:
    runner = model.runner
    for sequence in scheduler.admit():
        assert sequence.block_table is not None
        runner.copy_pages([sequence.block_table.copy] if sequence.block_table.copy else [])
        runner.begin(sequence)
    task = scheduler.next_encode_task()
    if task and (features := runner.encode(task, 10.0)) is not None:
        scheduler.encode_done(task, features, [runner.size_bytes(each) for each in features])
    batch = scheduler.batch(CHUNK_TOKENS)
    if not batch.sequences:
        return
    tokens = runner.compute(batch)
    scheduler.computed(batch)
    for sequence, sampled in zip(batch.sampled, tokens, strict=True):
        sequence.append(sampled.token)
        if sampled.token in model.end_ids or len(sequence.output_ids) == MAX_TOKENS:
            scheduler.remove(sequence)


def request_for(model: Model, trial: Trial, image_id: int) -> Request:
    rendered = model.template.render(trial.messages, trial.tools, trial.thinking)
    images = tuple(model.image_processor.process(picture) for picture in trial.pictures)
    remaining = iter(images)
    ids = [
        each
        for token in model.vocabulary.encode(rendered)
        for each in ([token] if token != image_id else [token] * next(remaining).tokens)
    ]
    return Request("eval", tuple(ids), SamplingParams(max_tokens=MAX_TOKENS), images)


def report(scores: dict[str, dict[str, list[float]]], markdown: bool) -> None:
    families = [family for family in (*FLOORS, "json exact") if any(family in each for each in scores.values())]
    between, edge, end = (" | ", "| ", " |") if markdown else ("  ", "", "")
    print(edge + between.join(["family".ljust(12), *scores]) + end)
    if markdown:
        print("| --- " * (len(scores) + 1) + "|")
    for family in families:
        cells = [f"{100 * sum(each[family]) / len(each[family]):.1f}" for each in scores.values()]
        print(edge + between.join([family.ljust(12), *cells]) + end)
    print("Percent of exact answers; `where`: mean IoU of boxes; `json`: parses, `json exact`: every object right.")


def _ignore(event: object) -> None:
    pass


if __name__ == "__main__":
    main()
