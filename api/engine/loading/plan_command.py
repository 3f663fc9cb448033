"""`python -m api.server --plan`: prints the memory plan of this card, or of any other, without loading anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from api.engine.config import EngineConfig
from api.engine.loaded_model import LoadError
from api.engine.loading.card import GIB, SPEEDS, Card, find_card, parse_size, pretended_card, speed_of
from api.engine.loading.families import FAMILIES, shapes_of
from api.engine.loading.memory_plan import CLASSES_GIB, ModelShape, choose, report
from api.engine.loading.picture_limit import flash_shape, shape_with_pictures
from api.engine.loading.placement import FLASH


def print_plan(config: EngineConfig, memory: str | None, name: str | None) -> int:
    """The exit code: 0 if the model fits, 1 if it does not, 2 for a size or a folder that cannot be read."""
    try:
        title, shape = _shape(config)
        card = _card(memory, name)
    except (ValueError, LoadError) as error:
        print(error, file=sys.stderr)
        return 2
    print(title)
    if config.context_tokens > shape.positions:
        print(f"GLM_CONTEXT_TOKENS must be <= {shape.positions}, the limit of this model. Given: {config.context_tokens}", file=sys.stderr)
        return 2
    if card is None:
        print("No CUDA GPU is found. What a card would do (--gpu-memory 12GiB for the whole plan, with --gpu NAME for its speed):\n")
        print("\n".join(_overview(shape, config)))
        return 0
    text, fits = report(shape, card, config)
    print(text)
    return 0 if fits else 1


def _card(memory: str | None, name: str | None) -> Card | None:
    """Raises ValueError."""
    if name and speed_of(name) is None:
        known = ", ".join(sorted(SPEEDS, key=str.lower))
        raise ValueError(
            f"--gpu must be a card whose figures are known: {known}. Given: {name}. "
            "Without it, --gpu-memory alone plans for a card of that size."
        )
    if memory is None and name is not None:
        raise ValueError("--gpu needs --gpu-memory: cards of one name are sold with several sizes")
    if memory is None:
        return find_card()
    try:
        return pretended_card(parse_size(memory), name)
    except ValueError as error:
        raise ValueError(f"--gpu-memory {error}") from None


def _shape(config: EngineConfig) -> tuple[str, ModelShape]:
    """What is planned for, and its shape: a folder's, or that of GLM-4.6V-Flash. Raises LoadError."""
    model = FLASH[config.hub] if config.model == "auto" else config.model
    folder = next((each for each in (Path(model), config.root / model) if (each / "config.json").is_file()), None)
    folder = folder or _downloaded(model)
    if folder is None:
        if model not in FLASH.values():
            raise LoadError(f"GLM_MODEL: {model} is not here, so its shape is not known. Give a folder with config.json.")
        return f"Model: {model}, not downloaded yet; the shape is the one that transformers describes.", flash_shape()
    import transformers

    try:
        model_config: Any = transformers.AutoConfig.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception as error:  # the library raises many types
        raise LoadError(f"{folder}: {type(error).__name__}: {error}") from None
    if model_config.model_type not in FAMILIES:
        raise LoadError(f"{folder}: model_type must be one of {sorted(FAMILIES)}. Given: {model_config.model_type!r}")
    return f"Model: {folder}", shape_with_pictures(model_config, shapes_of(model_config), processor)


def _downloaded(model: str) -> Path | None:
    """The folder of a snapshot in the cache of Hugging Face."""
    from huggingface_hub import try_to_load_from_cache

    if model.count("/") != 1:
        return None
    found = try_to_load_from_cache(model, "config.json")
    complete = found and isinstance(try_to_load_from_cache(model, "preprocessor_config.json"), str)
    return Path(found).parent if isinstance(found, str) and complete else None


def _overview(shape: ModelShape, config: EngineConfig) -> list[str]:
    lines = [f"  {'card':>8}  {'weights':8} {'KV cache':>16}  {'requests':>8} {'context':>8}  largest picture"]
    for size in CLASSES_GIB:
        try:
            chosen = choose(shape, pretended_card(size * GIB), config)
        except LoadError:
            lines.append(f"  {size:4} GiB  does not fit")
            continue
        lines.append(
            f"  {size:4} GiB  {chosen.recipe.name:8} {chosen.kv_tokens:9,} tokens  {chosen.slots:8} "
            f"{chosen.context_tokens:8,}  {chosen.picture_tokens:,} image tokens"
        )
    return lines
