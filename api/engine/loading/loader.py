"""Loads a model by id or folder: weights on their device, tokenizer, chat template, image processor.

Works without torchvision: the image processor uses its PIL backend.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from api.engine.config import EngineConfig
from api.engine.cuda.device import CudaDevice
from api.engine.cuda.runner import CudaRunner
from api.engine.guard import Comparison
from api.engine.image_processor import CheckpointImageProcessor
from api.engine.kernels.build import cache_folder
from api.engine.loaded_model import (
    AnswerLimits,
    Capacity,
    CheckpointTemplate,
    LoadError,
    Model,
    SamplingDefaults,
)
from api.engine.loading.card import CardMemory, find_card
from api.engine.loading.download import download, is_hub_id, split_revision
from api.engine.loading.families import FAMILIES, check_config, check_processor
from api.engine.loading.integrity import CheckpointIntegrity
from api.engine.loading.memory_plan import ANSWER_TOKENS, MemoryPlan, by_class, choose, defaults_for
from api.engine.loading.operations import OperationsChoice, without_compiled
from api.engine.loading.picture_limit import flash_shape, limit_pictures, shape_with_pictures
from api.engine.loading.placement import (
    CHUNK_TOKENS,
    CPU_ENCODER_CACHE_BYTES,
    FLASH,
    GIB,
    PAGE_TOKENS,
    Amount,
    Selection,
    choose_device,
    choose_dtype,
    choose_kv_cache,
    choose_model,
    choose_slots,
    choose_threads,
    free_gpu_bytes,
    free_memory_bytes,
)
from api.engine.loading.progress import Progress, part
from api.engine.loading.reference import NEEDS_BYTES, REFERENCE_FILE, LayeredNetwork, compare_once, differences
from api.engine.loading.rehearsal import size_cache
from api.engine.loading.revision import revision_of
from api.engine.loading.safetensors_source import Checkpoint, weight_files
from api.engine.loading.weights import Weights
from api.engine.model.operations import Operations, TorchOperations
from api.engine.model.recipe import make_recipe
from api.engine.model.rotary import head_dim_of
from api.engine.model.runner import Glm4vRunner
from api.engine.model.weight_source import WeightSource
from api.engine.text.tokenizer import UnsupportedTokenizer, Vocabulary

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<|image|>"
_FOLDERS = re.compile(r"(?<![\w.:/~-])~?(?:/[\w.@+-]+)*/(?=[\w.@+-])")
DEFAULT_MAX_CONTEXT = 8192  # keeps the KV cache small; GLM_CONTEXT_TOKENS may set more


def load(config: EngineConfig, progress: Progress) -> Model:
    """Choose, download, load. Runs in the engine thread, whose torch thread count it sets. Raises LoadError."""
    progress(0.02)  # torch and transformers are imported
    # 1. Choose what to run and where.
    device = choose_device(config)
    if device.value == "cuda" and not torch.cuda.is_available():
        raise LoadError("GLM_DEVICE is cuda, but torch finds no CUDA GPU.")
    chosen = choose_model(config, device.value)
    card = find_card() if device.value == "cuda" else None
    # 2. Locate or download its files.
    local = _local_folder(chosen.value, config.root)
    if local is None and card is not None and split_revision(chosen.value)[0] in FLASH.values():
        choose(flash_shape(), card, config)  # before a download of 20 GB for nothing
    folder = local or download(chosen.value, config.hub, part(progress, 0.01, 0.5))
    model_config = _model_config(folder)
    checkpoint = Checkpoint(folder, model_config)
    weights_bytes = _weights_bytes(folder)
    dtype, threads = choose_dtype(config, device.value, weights_bytes), choose_threads(config, weights_bytes)
    torch.set_num_threads(int(threads.value))
    choices = {"model": chosen, "device": device, "dtype": dtype, "threads": threads}
    for name, choice in choices.items():
        logger.info("event=choice name=%s value=%s reason=%s", name, choice.value, json.dumps(choice.reason))
    # 3. Compile the kernels, then load the weights for them.
    progress(0.05)
    torch_dtype = getattr(torch, dtype.value)
    image_processor = _image_processor(folder, model_config)
    plan, shape = None, shape_with_pictures(model_config, checkpoint.shapes, image_processor)
    if card is not None:
        plan = choose(shape, card, config, torch_dtype.itemsize)
        _log_plan(plan)
    recipe = plan.recipe if plan else make_recipe("bf16" if config.weights == "auto" else config.weights)
    operations = OperationsChoice(config, device.value, torch_dtype, model_config, recipe)
    weights = Weights(checkpoint, torch.device(device.value), torch_dtype)
    loading = part(progress, 0.05 if local else 0.5, 0.95)
    name = local.name if local else split_revision(chosen.value)[0]
    return _assemble(config, name, weights, image_processor, plan, by_class(shape, config), choices, operations, loading)


def _assemble(
    config: EngineConfig,
    name: str,
    weights: Weights,
    image_processor: Any,
    plan: MemoryPlan | None,
    classes: list[dict[str, Any]],
    choices: dict[str, Selection],
    operations: OperationsChoice,
    progress: Progress,
) -> Model:
    folder, model_config = weights.checkpoint.folder, weights.checkpoint.config
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise LoadError(f"{folder}: the chat template (chat_template.jinja) is missing.")
    try:
        vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    except (AttributeError, UnsupportedTokenizer) as error:
        raise LoadError(f"{folder}: the tokenizer is not a byte-level fast tokenizer: {error}") from None
    parameters = weights.checkpoint.parameters
    room = _room(config, weights, plan)
    pictures = limit_pictures(image_processor, plan.picture_tokens if plan else config.max_picture_tokens)
    runner, kernels, origin = _runner(weights, room.capacity(), room.context_tokens, operations, progress)
    # Together no larger than the largest image, for which there is memory.
    largest = pictures * runner.vision_encoder.merge**2
    runner.packing = replace(runner.packing, patches=min(runner.packing.patches, largest))
    if plan:
        tokens, reason = size_cache(runner, plan, CardMemory(), config.kv_cache_bytes)
        room = room.with_cache(Amount(tokens, reason), config)
        runner.resize_kv(tokens // PAGE_TOKENS)
    capacity, context_tokens = room.capacity(), room.context_tokens
    demo = _read_json(folder / "demo.json") if (folder / "demo.json").is_file() else None
    model_id = (demo or {}).get("id") or name
    generation = _generation_config(folder, model_config)
    defaults = _sampling_defaults(generation)
    facts: dict[str, Any] = {
        "class": FAMILIES[model_config.model_type].class_name,
        "revision": revision_of(folder),
        "parameters": parameters,
        "device": choices["device"].value,
        "dtype": choices["dtype"].value,
        "threads": int(choices["threads"].value),
        "demo": demo is not None,
        "knows": (demo or {}).get("knows"),
        "weights": runner.operations.recipe.name,
        "slots": capacity.slots,
        "kv_cache_tokens": capacity.pages * PAGE_TOKENS,
        "largest_picture_tokens": pictures,
        "plan": plan.facts() if plan else None,
        "card_classes": classes,
        "choices": {name: choice.reason for name, choice in choices.items()} | room.reasons,
    }
    facts["kernels"], facts["choices"]["kernels"], facts["proofs"] = kernels.value, kernels.reason, operations.proofs
    facts["choices"]["weights_read"] = origin
    facts["choices"] = {name: without_folders(reason) for name, reason in facts["choices"].items()}
    logger.info("event=choice name=kernels value=%s reason=%s", kernels.value, json.dumps(kernels.reason))
    template = CheckpointTemplate(tokenizer)
    processor = CheckpointImageProcessor(image_processor)
    reference = Comparison("off", "not asked for")
    if config.check_reference:

        def compare(network: Any = None) -> Iterator[str]:
            network = _network(weights) if network is None else network
            return differences(network, runner, tokenizer, vocabulary, template, processor, IMAGE_TOKEN)

        computed = {
            "class": facts["class"],
            "dtype": facts["dtype"],
            "device": facts["device"],
            "kernels": " ".join(filter(None, (kernels.value, getattr(runner.operations, "signature", "")))),
            "weights": facts["weights"],
        }
        reference = compare_once(
            cache_folder() / REFERENCE_FILE, folder, computed,
            compare if _has_room_for_network(weights) else None,
            partial(LayeredNetwork, _network_class(weights), folder, weights.dtype, choices["device"].value),
            compare,
        )  # fmt: skip
    return Model(
        id=model_id,
        runner=runner,
        vocabulary=vocabulary,
        template=template,
        image_processor=processor,
        image_token=IMAGE_TOKEN,
        integrity=CheckpointIntegrity(
            runner, vocabulary.special[IMAGE_TOKEN], weights, config.fingerprint_s, reference
        ),
        end_ids=_end_ids(generation.eos_token_id, vocabulary),
        context_tokens=context_tokens,
        capacity=capacity,
        answer=room.answer,
        defaults=defaults,
        facts=facts,
    )


def _image_processor(folder: Path, model_config: Any) -> Any:
    image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    if problems := list(check_processor(model_config, image_processor)):
        raise LoadError(f"{folder}: {'; '.join(problems)}")
    return image_processor


@dataclass(frozen=True)
class Room:
    """How much is served at once, and why."""

    slots: int
    context_tokens: int
    kv_tokens: int
    encoder_cache_bytes: int
    chunk_tokens: int
    answer: AnswerLimits
    reasons: dict[str, str]

    def capacity(self) -> Capacity:
        return Capacity(
            slots=self.slots,
            pages=self.kv_tokens // PAGE_TOKENS,
            page_tokens=PAGE_TOKENS,
            chunk_tokens=self.chunk_tokens,
            encoder_cache_bytes=self.encoder_cache_bytes,
        )

    def with_cache(self, kv: Amount, config: EngineConfig) -> Room:
        """With another KV cache, which may limit the context. Raises LoadError if that was set."""
        reasons = {**self.reasons, "kv_cache": kv.reason}
        if kv.number >= self.context_tokens:
            return replace(self, kv_tokens=kv.number, reasons=reasons)
        if config.context_tokens:
            raise LoadError(
                f"GLM_CONTEXT_TOKENS must be <= {kv.number}, the size of the KV cache. Given: {self.context_tokens}"
            )
        reasons["context_tokens"] = f"limited by the KV cache; {self.reasons['context_tokens']}"
        return replace(self, kv_tokens=kv.number, context_tokens=kv.number, reasons=reasons)


def _room(config: EngineConfig, weights: Weights, plan: MemoryPlan | None) -> Room:
    """On a card as planned, with a small KV cache until the card has been measured."""
    model_config = weights.checkpoint.config
    allowed = model_config.get_text_config().max_position_embeddings
    if plan is not None:
        defaults = defaults_for(plan.card)
        context, context_reason = _context(config, allowed, defaults.context_tokens)
        size = f"the default for {plan.card.total_bytes / GIB:.0f} GiB"
        reasons = {
            "weights": plan.reason,
            "largest_picture": plan.picture_reason,
            "context_tokens": context_reason,
            "slots": "set by GLM_SLOTS" if config.slots else size,
        }
        answer = AnswerLimits(ANSWER_TOKENS, defaults.thinking_tokens)
        return Room(plan.slots, context, plan.chunk_tokens, plan.encoder_cache_bytes, plan.chunk_tokens, answer, reasons)
    context, context_reason = _context(config, allowed, DEFAULT_MAX_CONTEXT)
    slots = choose_slots(config)
    token_bytes = kv_token_bytes(model_config, weights.dtype)
    kv = choose_kv_cache(
        config, token_bytes, context, slots.number, weights.checkpoint.parameters * weights.dtype.itemsize
    )
    cache = CPU_ENCODER_CACHE_BYTES if config.encoder_cache_bytes is None else config.encoder_cache_bytes
    reasons = {"context_tokens": context_reason, "slots": slots.reason}
    chunk = config.prefill_chunk_tokens or CHUNK_TOKENS
    return Room(slots.number, context, 0, cache, chunk, AnswerLimits(), reasons).with_cache(kv, config)


def _log_plan(plan: MemoryPlan) -> None:
    logger.info("event=choice name=weights value=%s reason=%s", plan.recipe.name, json.dumps(plan.reason))
    for each in plan.parts:
        logger.info("event=plan part=%s mib=%d", json.dumps(each.name), each.bytes >> 20)
    logger.info("event=plan part=%s mib=%d", json.dumps("KV cache"), plan.kv_tokens * plan.kv_token_bytes >> 20)


def _runner(
    weights: Weights, capacity: Capacity, context_tokens: int, choice: OperationsChoice, progress: Progress
) -> tuple[Glm4vRunner, Selection, str]:
    """The runner, the operations it uses, and where its weights came from."""

    def make(operations: Operations, source: WeightSource) -> Glm4vRunner:
        # Without the attention of the kernels a step depends on masks, which recorded steps do not have.
        if weights.device.type == "cuda" and not operations.needs_masks:
            runner = CudaRunner(source, capacity, context_tokens, operations, CudaDevice())
            runner.proofs = choice.proofs  # one record for `GET /info`
            return runner
        return Glm4vRunner(source, capacity, context_tokens, operations)

    operations, kernels = choice.choose()
    try:
        runner, origin = weights.load(operations, partial(make, operations), progress)
    except (RuntimeError, MemoryError) as error:
        if isinstance(operations, TorchOperations):
            raise
        operations, kernels = without_compiled(error)  # not enough memory for packed weights
        runner, origin = weights.load(operations, partial(make, operations))
    return runner, kernels, origin


def _network_class(weights: Weights) -> Any:
    return getattr(transformers, FAMILIES[weights.checkpoint.config.model_type].class_name)


def _network(weights: Weights) -> Any:
    """The network of transformers, for a comparison with it."""
    folder = weights.checkpoint.folder
    return _network_class(weights).from_pretrained(folder, dtype=weights.dtype).to(weights.device).eval()


def _has_room_for_network(weights: Weights) -> bool:
    free = free_gpu_bytes(weights.device.type) if weights.device.type == "cuda" else free_memory_bytes()
    return (free or 0) >= _weights_bytes(weights.checkpoint.folder) + NEEDS_BYTES


def _model_config(folder: Path) -> Any:
    """The config of transformers. Raises LoadError that names all that the engine does not compute."""
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type not in FAMILIES:
        raise LoadError(f"{folder}: model_type must be one of {sorted(FAMILIES)}. Given: {model_type!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # validation raises many types
        raise LoadError(f"{folder}/config.json: {type(error).__name__}: {error}") from None
    if problems := list(check_config(config)):
        raise LoadError(f"{folder}/config.json: {'; '.join(problems)}")
    return config


def _generation_config(folder: Path, config: Any) -> Any:
    if (folder / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(folder)
    return transformers.GenerationConfig.from_model_config(config)


def _local_folder(model: str, root: Path) -> Path | None:
    """The folder that a model name refers to, relative to the working directory or `root`; None for a hub id."""
    for folder in (Path(model), root / model):
        if folder.is_dir():
            if not (folder / "config.json").is_file() or not weight_files(folder):
                raise LoadError(f"{folder}: a model folder needs config.json and *.safetensors.")
            return folder.resolve()
    if not is_hub_id(model):
        raise LoadError(f"GLM_MODEL: {model} is neither a folder nor a hub id (owner/name or owner/name@revision).")
    return None


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file}: cannot be read: {error}") from None


def _context(config: EngineConfig, allowed: int, default: int) -> tuple[int, str]:
    asked = config.context_tokens
    if asked > allowed:
        raise LoadError(f"GLM_CONTEXT_TOKENS must be <= {allowed}, the limit of this model. Given: {asked}")
    if asked:
        return asked, "set by GLM_CONTEXT_TOKENS"
    return min(allowed, default), f"the model allows {allowed}; at most {default} unless set"


def kv_token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    text = config.get_text_config()
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim_of(text) * dtype.itemsize


def _end_ids(configured: int | list[int] | None, vocabulary: Vocabulary) -> frozenset[int]:
    """The end tokens of the generation config, by default those of all GLM models."""
    if configured is None:
        names = ("<|endoftext|>", "<|user|>", "<|observation|>")
        return frozenset(vocabulary.special[name] for name in names if name in vocabulary.special)
    return frozenset([configured] if isinstance(configured, int) else configured)


def _sampling_defaults(generation: Any) -> SamplingDefaults:
    if not generation.do_sample:
        return SamplingDefaults(repetition_penalty=float(generation.repetition_penalty or 1.0))
    return SamplingDefaults(
        temperature=float(1.0 if generation.temperature is None else generation.temperature),
        top_p=float(1.0 if generation.top_p is None else generation.top_p),
        top_k=int(generation.top_k or 0),
        repetition_penalty=float(generation.repetition_penalty or 1.0),
    )


def without_folders(reason: str) -> str:
    """For `GET /info`, whose readers have a key and no business in this machine's folders; the log has the whole path."""
    return _FOLDERS.sub("", reason)
