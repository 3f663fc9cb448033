"""The comparison of a newly loaded revision with transformers' own modules: the engine has its own arithmetic, and a new
revision of a checkpoint or of a library may not fit it.

Three pictures (a square, one of 3:1, a tiny one) and a text are answered by both: number of image tokens, tokens of the
text, M-RoPE positions, most probable next token. Agreement is remembered in a file by checkpoint and software, so that
later starts skip it. Runs once while loading, with the network of transformers if it is in memory and there is room for its
activations; otherwise that network is made without weights, and each layer has them only while it computes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from safetensors import safe_open

from api.engine.guard import Comparison
from api.engine.image_processor import as_floats
from api.engine.loaded_model import ImageProcessor, Template
from api.engine.loading.placement import GIB, free_gpu_bytes, free_memory_bytes
from api.engine.model.recipe import Weights
from api.engine.model.rotary import rope_positions
from api.engine.model.runner import Glm4vRunner
from api.engine.request import ImageInput, Request, SamplingParams
from api.engine.sequence import make_sequence
from api.engine.text.tokenizer import Vocabulary

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.json"  # in the cache folder of the compiled kernels: all starts on this machine share it
PICTURES = {"square": (224, 224), "3:1": (336, 112), "tiny": (28, 28)}  # pixels
NEEDS_BYTES = 2 * GIB  # for activations; the weights are in memory anyway
ACTIVATION_BYTES = GIB // 4  # of one layer at a time
# Both round differently, so tokens that are this close by the reference's own logits count as equal; the unit is the
# distance from the mean to the most probable token.
TOLERANCES: dict[Weights, float] = {"bf16": 0.03, "fp8": 0.1, "nf4": 0.25}  # quantised weights answer a little differently
MAX_REMEMBERED = 32


def compare_once(
    file: Path,
    folder: Path,
    facts: dict[str, str],
    compute: Callable[[], Iterator[str]] | None,
    by_layer: Callable[[], LayeredNetwork] | None = None,
    compute_with: Callable[[Any], Iterator[str]] | None = None,
) -> Comparison:
    """The remembered agreement of this checkpoint and software, else that of `compute`, which yields differences.

    Where `compute` is None or has too little memory, `compute_with` gets the network that `by_layer` makes. `facts`: what else the result depends on, such as the device. Never raises: a comparison that fails is `off`.
    """
    key = _identity(folder, facts)
    remembered = _read(file)
    if key in remembered:
        return Comparison("same", remembered[key])
    began = time.monotonic()
    device = facts["device"]
    free = (free_gpu_bytes(device) if device == "cuda" else free_memory_bytes()) or 0
    how, needed = "", NEEDS_BYTES
    try:
        if compute is not None and free >= NEEDS_BYTES:
            differences = list(compute())
        elif by_layer is not None and compute_with is not None:
            layered = by_layer()
            how, needed = ", layer by layer", layered.needs_bytes
            if free >= needed:
                differences = list(compute_with(layered.network))
        if free < needed:
            return _told(Comparison("off", f"skipped: {free / GIB:.1f} GiB are free, {needed / GIB:.1f} are needed{how}"))
    except Exception as error:  # the model may be right all the same
        logger.warning("event=reference_failed", exc_info=error)
        return _told(Comparison("off", f"skipped: {type(error).__name__}: {error}"))
    seconds = time.monotonic() - began
    if differences:
        return _told(Comparison("differs", "; ".join(differences)))
    detail = f"{len(PICTURES)} pictures and a text agree with transformers, compared in {seconds:.2f} s{how}"
    _write(file, dict([*remembered.items(), (key, detail)][-MAX_REMEMBERED:]))
    logger.info("event=reference outcome=same seconds=%.2f", seconds)
    return Comparison("same", detail)


class LayeredNetwork:
    """The network of transformers without weights. Each layer reads its own from the checkpoint when it is called, and drops
    them when it returns, so that there is room for a single one.

    `needs_bytes`: for the largest layer, as it is stored and as it computes, and for activations.
    """

    def __init__(self, class_: Any, folder: Path, dtype: torch.dtype, device: str) -> None:
        """Raises LookupError if a tensor of the network is not in the checkpoint under its own name."""
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            self.network = class_._from_config(config, dtype=dtype).eval()
        self._device, self._dtype = device, dtype
        self._files = _files_of_tensors(folder)
        _make_buffers(self.network, device)
        layers = {name: module for name, module in _layers(self.network) if any(True for _ in module.parameters())}
        absent = [full for name, module in layers.items() for full, _ in _tensors(name, module) if full not in self._files]
        if absent:
            raise LookupError(f"the checkpoint has no {absent[0]}")
        for name, module in layers.items():
            module.register_forward_pre_hook(partial(self._fill, name))
            module.register_forward_hook(_empty)
        largest = max(sum(tensor.numel() for _, tensor in _tensors(name, module)) for name, module in layers.items())
        self.needs_bytes = ACTIVATION_BYTES + largest * (dtype.itemsize + 4)

    def _fill(self, name: str, module: torch.nn.Module, _: Any) -> None:
        for full, tensor in _tensors(name, module):
            with safe_open(self._files[full], "pt") as file:
                stored = file.get_tensor(full)
            if stored.shape != tensor.shape:
                raise LookupError(f"{full} has shape {list(stored.shape)} in the checkpoint, {list(tensor.shape)} in transformers")
            owner, _, own = full.removeprefix(f"{name}.").rpartition(".")
            filled = stored.to(self._device, self._dtype)
            module.get_submodule(owner)._parameters[own] = torch.nn.Parameter(filled, requires_grad=False)


def _empty(module: torch.nn.Module, *_: Any) -> None:
    module.to("meta")


def _layers(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The members of each list of layers, and what belongs to none, in as large parts as there are."""
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.ModuleList)]
    lists = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]

    def walk(prefix: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if name in lists or any(one.startswith(f"{name}.") for one in lists):
                yield from walk(f"{name}.", child)
            else:
                yield name, child

    return walk("", network)


def _tensors(name: str, module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(f"{name}.{own}", tensor) for own, tensor in module.named_parameters()]


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _make_buffers(network: Any, device: str) -> None:
    """Those that no checkpoint holds, such as the frequencies of rotary embeddings, are computed as transformers does it."""
    for module in network.modules():
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device=device)
            network._init_weights(module)


@torch.inference_mode()
def differences(
    network: Any,
    runner: Glm4vRunner,
    tokenizer: Any,
    vocabulary: Vocabulary,
    template: Template,
    processor: ImageProcessor,
    image_token: str,
) -> Iterator[str]:
    """What the engine computes differently from `network`, one sentence for each; none if they agree."""
    image_id = vocabulary.special[image_token]
    for name, size in {**PICTURES, "text": None}.items():
        images: tuple[ImageInput, ...] = () if size is None else (processor.process(_picture(size)),)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What do you see, and where? 12 × 3?"}]
        rendered = template.render([{"role": "user", "content": content}], None, False)
        ids = vocabulary.encode(rendered)
        theirs = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if ids != theirs:
            yield f"{name}: the text has {len(ids)} other tokens than the {len(theirs)} of transformers"
            continue
        if size is not None and processor.count_tokens(*size) != images[0].tokens:
            yield f"{name}: {processor.count_tokens(*size)} image tokens were announced, {images[0].tokens} came"
        ids = [i for token in ids for i in ([token] * images[0].tokens if token == image_id else [token])]
        yield from _compare(name, network, runner, tuple(ids), images, image_id)


def _compare(
    name: str, network: Any, runner: Glm4vRunner, ids: tuple[int, ...], images: tuple[ImageInput, ...], image_id: int
) -> Iterator[str]:
    device = next(network.buffers()).device  # the weights of one that is read layer by layer are nowhere
    tokens = torch.tensor([ids], device=device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    sequence = make_sequence(Request("reference", ids, SamplingParams(1), images), lambda event: None, image_id)
    if images:
        inputs["pixel_values"] = torch.as_tensor(as_floats(images[0].patches)).to(device, network.dtype)
        inputs["image_grid_thw"] = torch.tensor([images[0].grid], device=device)
        inputs["mm_token_type_ids"] = (tokens == image_id).int()
        features = network.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        count = sum(len(part) for part in features)
        if count != images[0].tokens:
            yield f"{name}: transformers makes {count} image tokens, the prompt has {images[0].tokens}"
            return
        kinds, grid = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        positions, _ = network.model.get_rope_index(tokens, kinds, grid, attention_mask=inputs["attention_mask"])
        ours, _ = rope_positions(len(ids), sequence.spans, runner.vision_encoder.merge)
        if not torch.equal(positions[:, 0].cpu().long(), torch.from_numpy(ours).long()):
            yield f"{name}: the positions of the tokens differ"
    expected = network(**inputs, logits_to_keep=1, use_cache=False).logits[0, -1].float()
    found = runner.answer_alone(sequence)
    best, given = int(expected.argmax()), int(found.argmax())
    gap = float(expected[best] - expected[given]) / max(float(expected[best] - expected.mean()), 1e-6)
    limit = TOLERANCES[runner.operations.recipe.name]
    if not gap <= limit:  # also if it is not a number
        yield f"{name}: the most probable token is {given}, for transformers {best} (gap {gap:.3f}, limit {limit})"


def _picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    image = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2, height - height // 8), fill=(220, 30, 30))
    draw.rectangle((width * 5 // 8, height // 4, width * 7 // 8, height * 3 // 4), fill=(30, 60, 220))
    return image


def _identity(folder: Path, facts: dict[str, str]) -> str:
    """A digest of the checkpoint's files (names, sizes, times; small ones and headers whole), of the engine's own sources,
    and of the libraries' versions."""
    digest = blake2b(digest_size=16)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(2**16))
    engine = Path(__file__).resolve().parents[1]
    for source in sorted(path for path in engine.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        digest.update(source.read_bytes())
    digest.update(repr([(name, version(name)) for name in ("torch", "transformers", "tokenizers", "pillow")]).encode())
    digest.update(repr(sorted(facts.items())).encode())
    return digest.hexdigest()


def _told(comparison: Comparison) -> Comparison:
    level = logging.ERROR if comparison.outcome == "differs" else logging.WARNING
    logger.log(level, "event=reference outcome=%s detail=%s", comparison.outcome, json.dumps(comparison.detail))
    return comparison


def _read(file: Path) -> dict[str, str]:
    try:
        remembered = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): str(detail) for key, detail in remembered.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(file: Path, remembered: dict[str, str]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(remembered, indent=1), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:  # the next start compares again
        logger.warning("event=reference_not_remembered file=%s error=%s", file, error.strerror)
