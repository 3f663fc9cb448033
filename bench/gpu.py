"""python -m bench.gpu: what the engine does on an NVIDIA card, beside what the card could do.

Runs in sections, each of which prints and writes its figures at once, so that a run that is cut off keeps what it has
measured. Needs torch, transformers, triton and, for NF4, bitsandbytes; neither fastapi nor a checkpoint of the real
model: its exact shape is filled with random weights. `--dry` runs every section in small on the CPU.

The limit of a decode step is the time to read the bytes of its weights at the measured bandwidth of the card.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import queue
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw

from api.engine import process
from api.engine.config import EngineConfig
from api.engine.cuda.device import CudaDevice
from api.engine.cuda.operations import PATHS, CudaOperations
from api.engine.cuda.runner import CudaRunner
from api.engine.cuda.self_test import prove
from api.engine.cuda.shape import shape_of
from api.engine.engine import Engine
from api.engine.image_processor import as_floats
from api.engine.loaded_model import Capacity, LoadError, Model
from api.engine.loading.card import pretended_card
from api.engine.loading.families import shapes_of
from api.engine.loading.loader import load
from api.engine.loading.memory_plan import choose
from api.engine.loading.memory_plan import shape_of as shape_of_model
from api.engine.loading.progress import unseen
from api.engine.model.operations import TorchOperations
from api.engine.model.recipe import Recipe, Weights, make_recipe
from api.engine.model.runner import Glm4vRunner
from api.engine.model.weights import raw_bytes, weights_of
from api.engine.request import Delta, Done, Event, Failed, ImageInput, Request, SamplingParams
from api.engine.sequence import make_sequence
from bench.random_model import SHAPES, WordSource, flash_config, image_of, random_model, small_config

GIB = 2**30
PAGE_TOKENS = 16
CONTEXT = 8192
CHUNK = 1024


@dataclass
class Bench:
    """The card under test and the file that the figures go to."""

    dry: bool
    out: Path
    device: torch.device = field(init=False)
    bandwidth: float = 0.0  # bytes a second
    _cached: dict[str, Model] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.dry else "cuda")

    def tell(self, section: str, **figures: Any) -> None:
        line = {"section": section, **figures}
        print(json.dumps(line), flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def config(self) -> Any:
        return small_config() if self.dry else flash_config()


class Client:
    """Asks an engine like the server does, from another thread."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.engine = Engine(lambda progress: model, queue_size=256)
        self.engine.start()
        while self.engine.model is None:
            reason = self.engine.stats().reason
            if reason is not None:
                raise RuntimeError(reason)
            time.sleep(0.01)
        self._asked = 0

    def ask(self, tokens: int, answer: int, images: tuple[ImageInput, ...] = (), **sampling: Any) -> Asked:
        self._asked += 1
        image_id = self.model.vocabulary.special[self.model.image_token]
        ids = [300 + (7919 * self._asked + 31 * n) % 900 for n in range(tokens)]
        for image in images:
            ids[2:2] = [image_id] * image.tokens
        request = Request(str(self._asked), tuple(ids), SamplingParams(answer, **sampling), images)
        return Asked(self.engine, request)

    def stop(self) -> None:
        self.engine.stop(10)


class Asked:
    """A request under way: seconds from its submission to each delivery."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        self.request = request
        self.began = time.perf_counter()
        self.deltas: list[tuple[float, int]] = []  # seconds, tokens
        engine.submit(request, lambda event: self.events.put((time.perf_counter(), event)))

    def wait(self, timeout_s: float = 120.0) -> Asked:
        while True:
            at, event = self.events.get(timeout=timeout_s)
            if isinstance(event, Delta):
                self.deltas.append((at - self.began, event.tokens))
            elif isinstance(event, Failed):
                raise RuntimeError(event.message)
            elif isinstance(event, Done):
                return self

    @property
    def first_s(self) -> float:
        return self.deltas[0][0]

    @property
    def gaps_s(self) -> list[float]:
        return [after[0] - before[0] for before, after in zip(self.deltas, self.deltas[1:], strict=False)]


# The sections. Each takes the bench and raises if it cannot be done.


def machine(bench: Bench) -> None:
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    facts["transformers"] = transformers.__version__
    size = 2**22 if bench.dry else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    seconds = median(timed(bench, lambda: target.copy_(source), 5))
    bench.bandwidth = 2 * size / seconds
    side = 128 if bench.dry else 8192
    x, y = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product_s = median(timed(bench, lambda: x @ y, 5))
    if not bench.dry:
        facts |= {"card": torch.cuda.get_device_name(), "free_gib": round(torch.cuda.mem_get_info()[0] / GIB, 1)}
    bench.tell("machine", **facts, copy_gb_s=round(bench.bandwidth / 1e9), bf16_tflops=round(2 * side**3 / product_s / 1e12))


@contextmanager
def serving(bench: Bench, recipe: Weights, slots: int = 64) -> Iterator[Client]:
    """An engine with random weights of the exact shape."""
    slots, tokens = (4, 2048) if bench.dry else (slots, slots * 1280 + CONTEXT)
    bench.wait()
    began = time.perf_counter()
    made = make_recipe(recipe, capability=None if bench.dry else torch.cuda.get_device_capability())
    runner = runner_for(bench, operations(bench, made), slots, CHUNK, CONTEXT, tokens)
    bench.wait()
    built_s = time.perf_counter() - began
    client = Client(random_model(runner, runner_capacity(slots, CHUNK, tokens), CONTEXT))
    began = time.perf_counter()
    while isinstance(runner, CudaRunner) and runner.graphs.off is None and not runner.graphs.complete:
        if time.perf_counter() - began > 20:
            raise RuntimeError(f"only these graphs were captured in 20 s: {runner.graphs.captured}")
        time.sleep(0.05)
    graphs = {"graphs": str(runner.graphs.off or [f"{size.kind} {size.rows}" for size in runner.graphs.captured])} if isinstance(runner, CudaRunner) else {}
    process.freeze_objects()
    size = sum(len(raw_bytes(tensor)) for _, tensor in weights_of(runner))
    bench.tell("model", recipe=recipe, **graphs, graphs_s=round(time.perf_counter() - began, 1), weights_gib=round(size / GIB, 2), built_s=round(built_s, 1), **peak(bench))
    try:
        yield client
    finally:
        client.stop()


def runner_for(bench: Bench, ops: Any, slots: int, chunk: int, context: int, tokens: int = 4096) -> Glm4vRunner:
    source = WordSource(bench.config(), bench.device, torch.bfloat16)
    capacity = runner_capacity(slots, chunk, tokens)
    if bench.dry:
        return Glm4vRunner(source, capacity, context, ops)
    return CudaRunner(source, capacity, context, ops, CudaDevice())


def runner_capacity(slots: int, chunk: int, tokens: int) -> Capacity:
    return Capacity(slots, tokens // PAGE_TOKENS, PAGE_TOKENS, chunk, 256 * 2**20)


def operations(bench: Bench, recipe: Recipe) -> Any:
    if bench.dry:
        return TorchOperations(PAGE_TOKENS, recipe)
    return CudaOperations(PAGE_TOKENS, torch.cuda.get_device_capability(), recipe)


def peak(bench: Bench) -> dict[str, float]:
    if bench.dry:
        return {}
    return {"allocated_gib": round(torch.cuda.memory_allocated() / GIB, 2), "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)}


def plans(bench: Bench) -> None:
    """The memory plan of cards of several sizes beside what the same work takes: the weights, the largest picture, a full
    KV cache, all recorded steps. The card at hand pretends to be smaller."""
    shape = shape_of_model(bench.config(), shapes_of(bench.config()))
    cards: list[tuple[int, Weights]] = [(8, "nf4"), (12, "nf4"), (16, "fp8"), (24, "bf16"), (48, "bf16")]
    for gib, weights in cards[2:4] if bench.dry else cards:
        card = pretended_card(gib * GIB)
        config = EngineConfig(weights=weights, slots=4 if bench.dry else 0)
        try:
            chosen = choose(shape, card, config)
        except LoadError as error:
            bench.tell("plan", gib=gib, weights=weights, refused=str(error))
            continue
        plan = replace(chosen, kv_tokens=min(chosen.kv_tokens, 4096), picture_tokens=64) if bench.dry else chosen
        before = device_bytes(bench)
        runner = runner_for(bench, operations(bench, plan.recipe), plan.slots, plan.chunk_tokens, plan.context_tokens)
        runner.rehearse(plan.picture_tokens, plan.chunk_tokens, plan.slots + 1)
        runner.resize_kv(plan.kv_tokens // PAGE_TOKENS)
        runner.warm_up()
        while runner.prepare_next():
            pass
        runner.rehearse(plan.picture_tokens, plan.chunk_tokens, plan.slots + 1)
        bench.wait()
        kv = plan.kv_tokens * plan.kv_token_bytes
        left_out = sum(plan.bytes_of(name) for name in ("reserve", "encoder cache"))
        bench.tell(
            "plan", gib=gib, weights=weights, vision=plan.recipe.vision, host_embeddings=plan.recipe.host_embeddings,
            slots=plan.slots, picture_tokens=plan.picture_tokens, kv_tokens=plan.kv_tokens,
            planned_mib=(plan.used_bytes + kv - left_out) >> 20, taken_mib=(device_bytes(bench) - before) >> 20,
            parts={part.name: part.bytes >> 20 for part in plan.parts} | {"KV cache": kv >> 20}, **peak(bench),
        )  # fmt: skip
        del runner
        gc.collect()
        if not bench.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def device_bytes(bench: Bench) -> int:
    """Taken from the device by all processes: with what the allocator keeps, the context and the libraries."""
    if bench.dry:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def decode(bench: Bench, client: Client, recipe: Weights) -> None:
    """Streams that decode together: tokens a second by the gaps between the tokens of one stream."""
    read = sum(len(raw_bytes(t)) for name, t in weights_of(client.model.runner) if name.startswith("decoder.") and "embeddings" not in name)
    limit_s = read / bench.bandwidth
    for rows in (1, 2) if bench.dry else (1, 4, 16, 64):
        answer = 8 if bench.dry else 96
        for _ in range(2):  # the first pays for what is compiled or captured
            asked = [client.ask(64, answer) for _ in range(rows)]
            gaps = [gap for one in asked for gap in one.wait().gaps_s[-answer // 2 :]]
        step_s = sum(gaps) / len(gaps)
        bench.tell(
            "decode", recipe=recipe, rows=rows, ms_a_step=round(step_s * 1e3, 2), tokens_s=round(rows / step_s),
            limit_ms=round(limit_s * 1e3, 2), share_of_limit=round(limit_s / step_s, 2),
        )  # fmt: skip


def first_token(bench: Bench, client: Client, recipe: Weights) -> None:
    """Milliseconds to the first token on an idle card, median of five different questions."""
    patch = client.model.runner.vision_encoder.patch_size  # type: ignore[attr-defined]
    grids = {"text": None, "336x336": (1, 24, 24), "1000 tokens": (1, 64, 64), "448x448, 8 tokens": (1, 32, 32)}
    for name, grid in grids.items():
        if bench.dry and grid:
            grid = (1, 8, 8)
        firsts, wholes = [], []
        for number in range(3 if bench.dry else 7):
            images = (image_of(grid, patch, 1000 * len(name) + number),) if grid else ()
            asked = client.ask(60 if not grid else 24, 8, images).wait()
            firsts.append(asked.first_s)
            wholes.append(asked.deltas[-1][0])
        bench.tell("first token", recipe=recipe, question=name, ttft_ms=round(median(firsts[2:]) * 1e3, 1), answer_8_ms=round(median(wholes[2:]) * 1e3, 1))


def mix(bench: Bench, client: Client, recipe: Weights) -> None:
    """Pictures that come into running streams: how long those streams wait for a token."""
    patch = client.model.runner.vision_encoder.patch_size  # type: ignore[attr-defined]
    streams = [client.ask(64, 16 if bench.dry else 400) for _ in range(2 if bench.dry else 16)]
    pictures = []
    for number in range(2 if bench.dry else 12):
        time.sleep(0.02 if bench.dry else 0.15)
        pictures.append(client.ask(24, 8, (image_of((1, 8, 8) if bench.dry else (1, 48, 48), patch, 77_000 + number),)))
    firsts = [asked.wait().first_s for asked in pictures]
    gaps = sorted(gap for asked in streams for gap in asked.wait().gaps_s)
    bench.tell(
        "mix", recipe=recipe, streams=len(streams), pictures=len(pictures), picture_ttft_ms=round(median(firsts) * 1e3),
        gap_ms_p50=round(gaps[len(gaps) // 2] * 1e3, 1), gap_ms_p99=round(gaps[len(gaps) * 99 // 100] * 1e3, 1), gap_ms_max=round(gaps[-1] * 1e3, 1),
    )  # fmt: skip


def served(recipe: Weights) -> Callable[[Bench], None]:
    def section(bench: Bench) -> None:
        with serving(bench, recipe) as client:
            for part in (decode, first_token, mix):
                part(bench, client, recipe)
            bench.tell("memory", recipe=recipe, **peak(bench))

    return section


def parity(bench: Bench) -> None:
    """The logits of the engine's runner and those of transformers' network with the same weights, at every token of an
    answer; beside it how far transformers is from itself with another attention. And the time of `generate`."""
    from transformers.models.glm4v import Glm4vForConditionalGeneration

    config = bench.config()
    source = WordSource(config, bench.device, torch.bfloat16)
    with torch.device("meta"):
        network = Glm4vForConditionalGeneration(config).to(torch.bfloat16).eval()
    network = network.to_empty(device=bench.device)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            tensor.copy_(source.take(name))
    rebuild_buffers(network, bench.device)
    answer = 8 if bench.dry else 48
    with serving(bench, "bf16", slots=4) as client:
        runner: Any = client.model.runner
        image_id = client.model.vocabulary.special[client.model.image_token]
        network.config.image_token_id = network.model.config.image_token_id = image_id
        grid = (1, 8, 8) if bench.dry else (1, 24, 24)
        for name, images in {"text": (), "336x336": (image_of(grid, runner.vision_encoder.patch_size, 5),)}.items():
            request = client.ask(40, answer, images).wait().request
            inputs = generate_inputs(request, image_id, bench.device)
            with torch.inference_mode():
                greedy = {"max_new_tokens": answer, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                network.generate(**inputs, **greedy)
                bench.wait()
                began = time.perf_counter()
                tokens = network.generate(**inputs, **greedy)[0].tolist()
                bench.wait()
                generate_s = time.perf_counter() - began
                inputs = generate_inputs(replace(request, prompt_ids=tuple(tokens[:-1])), image_id, bench.device)
                logits = {}
                for attention in ("sdpa", "eager"):
                    network.set_attn_implementation(attention)
                    logits[attention] = network(**inputs, logits_to_keep=answer, use_cache=False).logits[0].float()
                ours = []
                for end in range(len(tokens) - answer, len(tokens)):
                    ids = replace(request, prompt_ids=tuple(tokens[:end]))
                    ours.append(runner.answer_alone(make_sequence(ids, lambda event: None, image_id)))
                found = torch.stack(ours)
            equal = int((found.argmax(-1) == logits["sdpa"].argmax(-1)).sum())
            bench.tell(
                "parity", question=name, relative_error=relative(found, logits["sdpa"]),
                transformers_against_itself=relative(logits["eager"], logits["sdpa"]), equal_argmax=equal, of=answer,
                transformers_equal=int((logits["eager"].argmax(-1) == logits["sdpa"].argmax(-1)).sum()),
                generate_ms_a_token=round(generate_s / answer * 1e3, 1),
            )  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return round(float((found - expected).norm() / expected.norm()), 4)


def generate_inputs(request: Request, image_id: int, device: torch.device) -> dict[str, Any]:
    tokens = torch.tensor([request.prompt_ids], device=device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if request.images:
        inputs["pixel_values"] = torch.as_tensor(as_floats(request.images[0].patches)).to(device, torch.bfloat16)
        inputs["image_grid_thw"] = torch.tensor([request.images[0].grid], device=device)
        inputs["mm_token_type_ids"] = (tokens == image_id).int()
    return inputs


def rebuild_buffers(network: Any, device: torch.device) -> None:
    """Rotary frequencies, which a network made on `meta` does not have."""
    for module in network.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq.to(device), fresh.original_inv_freq.to(device)


def timed(bench: Bench, work: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each run after two that warm up, by CUDA events."""
    for _ in range(2):
        work()
    took = []
    for _ in range(times):
        if bench.dry:
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1000)
    return took


def proof(bench: Bench) -> None:
    """The comparison of each fast path with plain torch that every start makes."""
    config = bench.config()
    for recipe, paths in (("bf16", PATHS), ("fp8", ("float8",)), ("nf4", ("nf4",))):
        capability = (9, 0) if bench.dry else torch.cuda.get_device_capability()
        fast = CudaOperations(PAGE_TOKENS, capability, make_recipe(recipe))
        if bench.dry:
            fast.use_plain(PATHS)
        began = time.perf_counter()
        proofs = prove(fast, shape_of(config, PAGE_TOKENS), bench.device, torch.bfloat16, paths)
        found = {p.path: f"{p.proven}: {p.reason}" for p in proofs}
        bench.tell("proof", recipe=recipe, seconds=round(time.perf_counter() - began, 1), paths=found)


def loader(bench: Bench) -> None:
    """A small checkpoint of the same family through the loader of the server, in every recipe, and once more from what
    was kept; then the demo, whose heads the kernels do not compute. Each answers a question about a picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "small"
        write_checkpoint(folder, small_config())
        for weights in ("bf16", "fp8", "nf4", "fp8"):
            told = load_and_ask(bench, EngineConfig(
                model=str(folder), device=bench.device.type, dtype="bfloat16", weights=weights, slots=4,
                check_reference=weights == "bf16", fingerprint_s=0,
            ))  # fmt: skip
            bench.tell("loader", weights=weights, **told)
    for dtype in ("float32", "bfloat16"):
        told = load_and_ask(bench, EngineConfig(
            model=str(SHAPES), device=bench.device.type, dtype=dtype, weights="bf16", slots=4, fingerprint_s=0,
        ))  # fmt: skip
        bench.tell("loader", model="the demo", dtype=dtype, **told)


def load_and_ask(bench: Bench, config: EngineConfig) -> dict[str, Any]:
    began = time.perf_counter()
    model = load(config, unseen)
    loaded_s = time.perf_counter() - began
    client = Client(model)
    try:
        picture = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(picture).ellipse((40, 40, 180, 180), fill=(220, 30, 30))
        image = model.image_processor.process(picture)
        content = [{"type": "image"}, {"type": "text", "text": "What color is the circle?"}]
        rendered = model.template.render([{"role": "user", "content": content}], None, False)
        image_id = model.vocabulary.special[model.image_token]
        ids = [i for t in model.vocabulary.encode(rendered) for i in ([t] * image.tokens if t == image_id else [t])]
        asked = Asked(client.engine, Request("picture", tuple(ids), SamplingParams(12), (image,)))
        text = ""
        while True:
            _, event = asked.events.get(timeout=60)
            if isinstance(event, Delta):
                text += event.text
            elif isinstance(event, Failed):
                raise RuntimeError(event.message)
            else:
                break
    finally:
        client.stop()
    facts = model.facts
    reference = model.integrity.reference.detail if model.integrity else ""
    return {
        "loaded_s": round(loaded_s, 1), "runner": type(model.runner).__name__, "kernels": facts["kernels"],
        "why": facts["choices"]["kernels"], "read": facts["choices"]["weights_read"], "kv_tokens": facts["kv_cache_tokens"],
        "kv": facts["choices"].get("kv_cache"), "reference": reference, "proofs": dict(facts["proofs"]), "answer": text[:80],
    }  # fmt: skip


def write_checkpoint(folder: Path, config: Any) -> None:
    """A random checkpoint with the demo's tokenizer, template and image processor."""
    from transformers.models.glm4v import Glm4vForConditionalGeneration

    torch.manual_seed(46)
    Glm4vForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    for file in SHAPES.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "demo.json"):
            shutil.copy(file, folder)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "machine": machine,
    "proof": proof,
    "loader": loader,
    "parity": parity,
    "bf16": served("bf16"),
    "fp8": served("fp8"),
    "nf4": served("nf4"),
    "plans": plans,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="in small on the CPU: shows that every section runs")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, in this order")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="figures, one JSON object a line")
    given = parser.parse_args(arguments)
    bench = Bench(given.dry, given.out)
    failed = 0
    for name in given.sections.split(","):
        began = time.monotonic()
        try:
            SECTIONS[name](bench)
        except Exception as error:  # the others are still worth their time
            failed += 1
            bench.tell(name, failed=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-2000:])
        bench.tell("time", of=name, seconds=round(time.monotonic() - began, 1))
        gc.collect()
        if not bench.dry:
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
