"""The engine's configuration. The caller builds it; the engine reads no settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """`auto`, 0 and None leave a choice to api.engine.loading.placement, which gives a reason for each."""

    model: str = "auto"  # hub id, folder, or `auto`
    root: Path = Path()  # relative model folders are also searched here
    demo: Path = Path("models/shapes")  # the checkpoint for `auto` without a GPU, relative to `root`
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 0  # of torch on the CPU
    context_tokens: int = 0  # limit of prompt and answer together
    slots: int = 0  # requests that run at once
    kv_cache_bytes: int = 0
    weights: Literal["auto", "bf16", "fp8", "nf4"] = "auto"  # the recipe of quantisation
    max_picture_tokens: int = 0  # of one picture; larger ones are scaled down
    encoder_cache_bytes: int | None = None
    prefill_chunk_tokens: int | None = None  # most prompt tokens in one step; None: by card
    fingerprint_s: float = 600.0  # between two comparisons of an idle model with itself
    check_reference: bool = False  # compare an unknown revision with transformers while loading
    # `steady`: the same kernel for any number of rows; `torch`: nothing is compiled.
    kernels: Literal["auto", "steady", "torch"] = "auto"
