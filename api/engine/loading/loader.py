"""Loads a model by id or folder: weights on their device, tokenizer, chat template, image processor.

Works without torchvision: the image processor uses its PIL backend.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from api.engine.config import EngineConfig
from api.engine.guard import Comparison
from api.engine.kernels.build import cache_folder
from api.engine.loaded_model import (
    Capacity,
    CheckpointImageProcessor,
    CheckpointTemplate,
    LoadError,
    Model,
    SamplingDefaults,
)
from api.engine.loading.download import download
from api.engine.loading.integrity import CheckpointIntegrity
from api.engine.loading.operations import OperationsChoice, without_compiled
from api.engine.loading.placement import (
    PAGE_TOKENS,
    Selection,
    choose_device,
    choose_dtype,
    choose_kv_cache,
    choose_model,
    choose_slots,
    choose_threads,
    free_gpu_bytes,
)
from api.engine.loading.progress import Progress, part, weights_progress
from api.engine.loading.reference import REFERENCE_FILE, LayeredNetwork, compare_once, differences
from api.engine.loading.revision import revision_of
from api.engine.model.operations import TorchOperations
from api.engine.model.runner import Glm4vRunner
from api.engine.process import release_freed_memory
from api.engine.text.tokenizer import UnsupportedTokenizer, Vocabulary

logger = logging.getLogger(__name__)

CLASSES = {"glm4v": "Glm4vForConditionalGeneration", "glm46v": "Glm46VForConditionalGeneration"}
IMAGE_TOKEN = "<|image|>"
DEFAULT_MAX_CONTEXT = 8192  # keeps the KV cache small; GLM_CONTEXT_TOKENS may set more


def load(config: EngineConfig, progress: Progress) -> Model:
    """Choose, download, load. Runs in the engine thread, whose torch thread count it sets. Raises LoadError."""
    progress(0.02)  # torch and transformers are imported
    # 1. Choose what to run and where.
    device = choose_device(config)
    if device.value == "cuda" and not torch.cuda.is_available():
        raise LoadError("GLM_DEVICE is cuda, but torch finds no CUDA GPU.")
    chosen = choose_model(config, device.value, free_gpu_bytes(device.value))
    # 2. Locate or download its files.
    local = _local_folder(chosen.value, config.root)
    folder = local or download(chosen.value, config.hub, part(progress, 0.01, 0.5))
    model_type = _read_json(folder / "config.json").get("model_type")
    class_name = CLASSES.get(model_type or "")
    if class_name is None:
        raise LoadError(f"{folder}: model_type must be one of {sorted(CLASSES)}. Given: {model_type!r}")
    weights_bytes = _weights_bytes(folder)
    dtype, threads = choose_dtype(config, device.value, weights_bytes), choose_threads(config, weights_bytes)
    torch.set_num_threads(int(threads.value))
    choices = {"model": chosen, "device": device, "dtype": dtype, "threads": threads}
    for name, choice in choices.items():
        logger.info("event=choice name=%s value=%s reason=%s", name, choice.value, json.dumps(choice.reason))
    # 3. Load the weights while the kernels are compiled.
    progress(0.05)
    torch_dtype = getattr(torch, dtype.value)
    operations = OperationsChoice(config, device.value, torch_dtype, transformers.AutoConfig.from_pretrained(folder))

    def load_network() -> Any:
        return getattr(transformers, class_name).from_pretrained(folder, dtype=torch_dtype).to(device.value).eval()

    with weights_progress(part(progress, 0.05 if local else 0.5, 0.95)):
        network = load_network()
    progress(0.95)
    model = _assemble(config, chosen, folder if local else None, folder, network, choices, operations, load_network)
    del network
    release_freed_memory()  # of the unpacked weights
    return model


def _assemble(
    config: EngineConfig,
    chosen: Selection,
    local: Path | None,
    folder: Path,
    network: Any,
    choices: dict[str, Selection],
    operations: OperationsChoice,
    load_network: Callable[[], Any],
) -> Model:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise LoadError(f"{folder}: the chat template (chat_template.jinja) is missing.")
    try:
        vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    except (AttributeError, UnsupportedTokenizer) as error:
        raise LoadError(f"{folder}: the tokenizer is not a byte-level fast tokenizer: {error}") from None
    context_tokens, context_reason = _context(config, network.config.get_text_config().max_position_embeddings)
    slots = choose_slots(config, choices["device"].value)
    kv = choose_kv_cache(config, choices["device"].value, kv_token_bytes(network), context_tokens, slots.number)
    if kv.number < context_tokens:
        if config.context_tokens:
            raise LoadError(
                f"GLM_CONTEXT_TOKENS must be <= {kv.number}, the size of the KV cache. Given: {context_tokens}"
            )
        context_tokens, context_reason = kv.number, f"limited by the KV cache; {context_reason}"
    capacity = Capacity(
        slots=slots.number,
        pages=kv.number // PAGE_TOKENS,
        page_tokens=PAGE_TOKENS,
        chunk_tokens=config.prefill_chunk_tokens,
        encoder_cache_bytes=config.encoder_cache_bytes,
    )
    parameters = sum(p.numel() for p in network.parameters())
    demo = _read_json(folder / "demo.json") if (folder / "demo.json").is_file() else None
    model_id = (demo or {}).get("id") or (local.name if local else chosen.value)
    generation = network.generation_config
    defaults = _sampling_defaults(generation)
    facts: dict[str, Any] = {
        "class": type(network).__name__,
        "revision": revision_of(folder),
        "parameters": parameters,
        "device": choices["device"].value,
        "dtype": choices["dtype"].value,
        "threads": int(choices["threads"].value),
        "demo": demo is not None,
        "knows": (demo or {}).get("knows"),
        "slots": slots.number,
        "kv_cache_tokens": capacity.pages * PAGE_TOKENS,
        "choices": {name: choice.reason for name, choice in choices.items()}
        | {"context_tokens": context_reason, "slots": slots.reason, "kv_cache": kv.reason},
    }
    runner, kernels = _runner(network, capacity, context_tokens, operations)
    facts["kernels"], facts["choices"]["kernels"] = kernels.value, kernels.reason
    logger.info("event=choice name=kernels value=%s reason=%s", kernels.value, json.dumps(kernels.reason))
    template = CheckpointTemplate(tokenizer)
    processor = CheckpointImageProcessor(transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"))
    reference = Comparison("off", "not asked for")
    if config.check_reference:
        computed = {"class": facts["class"], "dtype": facts["dtype"], "device": facts["device"], "kernels": kernels.value}
        reference = compare_once(
            cache_folder() / REFERENCE_FILE, folder, computed,
            partial(differences, network, runner, tokenizer, vocabulary, template, processor, IMAGE_TOKEN),
            partial(LayeredNetwork, type(network), folder, network.dtype, choices["device"].value),
            lambda layered: differences(layered, runner, tokenizer, vocabulary, template, processor, IMAGE_TOKEN),
        )  # fmt: skip
    return Model(
        id=model_id,
        runner=runner,
        vocabulary=vocabulary,
        template=template,
        image_processor=processor,
        image_token=IMAGE_TOKEN,
        integrity=CheckpointIntegrity(
            runner, vocabulary.special[IMAGE_TOKEN], load_network, config.fingerprint_s, reference
        ),
        end_ids=_end_ids(generation.eos_token_id, vocabulary),
        context_tokens=context_tokens,
        capacity=capacity,
        defaults=defaults,
        facts=facts,
    )


def _runner(
    network: Any, capacity: Capacity, context_tokens: int, choice: OperationsChoice
) -> tuple[Glm4vRunner, Selection]:
    operations, kernels = choice.choose()
    try:
        return Glm4vRunner(network, capacity, context_tokens, operations), kernels
    except (RuntimeError, MemoryError) as error:
        if isinstance(operations, TorchOperations):
            raise
        operations, kernels = without_compiled(error)  # not enough memory for packed weights
        return Glm4vRunner(network, capacity, context_tokens, operations), kernels


def _local_folder(model: str, root: Path) -> Path | None:
    """The folder that a model name refers to, relative to the working directory or `root`; None for a hub id."""
    for folder in (Path(model), root / model):
        if folder.is_dir():
            if not (folder / "config.json").is_file() or not _weights_bytes(folder):
                raise LoadError(f"{folder}: a model folder needs config.json and *.safetensors.")
            return folder.resolve()
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise LoadError(f"GLM_MODEL: {model} is neither a folder nor a hub id (owner/name).")
    return None


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file}: cannot be read: {error}") from None


def _context(config: EngineConfig, allowed: int) -> tuple[int, str]:
    asked = config.context_tokens
    if asked > allowed:
        raise LoadError(f"GLM_CONTEXT_TOKENS must be <= {allowed}, the limit of this model. Given: {asked}")
    if asked:
        return asked, "set by GLM_CONTEXT_TOKENS"
    return min(allowed, DEFAULT_MAX_CONTEXT), f"the model allows {allowed}; at most {DEFAULT_MAX_CONTEXT} unless set"


def kv_token_bytes(network: Any) -> int:
    """Bytes of the keys and values of one token in all layers."""
    text = network.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * network.dtype.itemsize


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
