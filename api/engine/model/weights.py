"""The weights of a runner as memory: names, bytes and sums, whatever layout the operations have given them.

A sum of 64-bit words finds every flip of a single bit, in any layout and on any device, at the speed of the memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch

PART_BYTES = 64 * 2**20  # summed at once: about 10 ms on the CPU
_SKIPPED = frozenset({"kv", "_tables", "_scratch"})  # caches, and room for results
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def weights_of(runner: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a Glm4vRunner computes with, once, by a name like `decoder.layers.3.qkv.weight`."""
    seen: set[int] = set()
    for name, part in (("decoder", runner.decoder), ("vision", runner.vision_encoder)):
        for found, tensor in _tensors(name, part):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield found, tensor


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its memory as uint8 [bytes], not a copy. It must outlive the result."""
    if tensor.is_mkldnn:  # packed by oneDNN
        size = int(torch.ops.mkldnn._nbytes(tensor))
        memory = (ctypes.c_char * size).from_address(int(torch.ops.mkldnn.data_ptr(tensor)))
        return torch.frombuffer(memory, dtype=torch.uint8)
    if not tensor.is_contiguous():
        raise ValueError("the weights are not contiguous")
    return tensor.detach().reshape(-1).view(torch.uint8)


def part_sums(runner: Any) -> Iterator[tuple[str, int]]:
    """Name and sum of each part of at most PART_BYTES."""
    for name, tensor in weights_of(runner):
        memory = raw_bytes(tensor)
        for start in range(0, len(memory), PART_BYTES):
            yield f"{name}+{start}", word_sum(memory[start : start + PART_BYTES])


def word_sum(memory: torch.Tensor) -> int:
    """The sum of uint8 memory as 64-bit words, or as the largest words that fit, with overflow."""
    _, word = next(w for w in _WORDS if len(memory) % w[0] == 0 and memory.storage_offset() % w[0] == 0)
    return int(memory.view(word).sum(dtype=torch.int64))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, torch.nn.Module):
        yield from ((f"{name}.{found}", tensor.detach()) for found, tensor in value.named_parameters())
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(f"{name}.{number}", item)
    elif type(value).__module__.startswith("api.engine."):
        for attribute, item in vars(value).items():
            if attribute not in _SKIPPED:
                yield from _tensors(f"{name}.{attribute.lstrip('_')}", item)
