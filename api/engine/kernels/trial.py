"""python -m api.engine.kernels.trial LIBRARY: compares a compiled library with torch.

A process of its own, because an illegal instruction would kill it. Exit code 0 if every operation agrees with torch on
random numbers; 1 with the reason on standard output.
"""

from __future__ import annotations

import sys

import torch

from api.engine.kernels.build import PAGE_TOKENS, KernelError
from api.engine.kernels.operations import CompiledOperations
from api.engine.model.operations import AttentionMetadata, Operations, TorchOperations

TOLERANCE = 0.05  # relative and absolute; the numbers are about 1, in bfloat16
THREADS = 2


def main(arguments: list[str]) -> int:
    torch.set_num_threads(THREADS)
    try:
        torch.ops.load_library(arguments[0])
        compare(CompiledOperations())
    except (KernelError, OSError, RuntimeError) as error:
        print(str(error).splitlines()[0])
        return 1
    return 0


@torch.inference_mode()
def compare(ours: Operations) -> None:
    """Raises KernelError for the first operation that differs from torch's."""
    theirs = TorchOperations(PAGE_TOKENS)
    generator = torch.Generator().manual_seed(46)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    rows, kv_heads, shared, dim = 5, 2, 5, 64
    x, delta, delta_norm, next_norm = random(rows, 96), random(rows, 96), random(96), random(96)
    qkv, kv = random(rows, kv_heads * (shared + 2), dim), random(8 * PAGE_TOKENS, 2 * kv_heads, dim)
    patches = random(10, 96)
    cos, sin, slot_mapping = random(*qkv.shape), random(*qkv.shape), torch.arange(rows) * 7
    cos[:, -kv_heads:], sin[:, -kv_heads:] = 1, 0  # values are not rotated
    lengths = torch.tensor([1, 16, 17, 40, 48])
    beyond = torch.where(torch.arange(48) < lengths[:, None], 0.0, -torch.inf).to(torch.bfloat16)
    decode = AttentionMetadata(0, rows, torch.arange(15).view(rows, 3) % 8, beyond[:, None, None], lengths)
    later = torch.where(torch.arange(48) <= torch.arange(40, 40 + rows)[:, None], 0.0, -torch.inf).to(torch.bfloat16)
    prefill = AttentionMetadata(0, rows, torch.tensor([5, 0, 3]), later, first=40)
    image_cos, image_sin = random(10, 16).float(), random(10, 16).float()
    for name in ("add_norm", "rotate_store", "attend_decode", "attend_prefill", "attend_image"):
        results = []
        for operations in (ours, theirs):
            stored = kv.clone()
            arguments = {
                "add_norm": (x, delta, delta_norm, next_norm, 1e-5),
                "rotate_store": (qkv.clone(), cos, sin, stored, slot_mapping),
                "attend_decode": (qkv, stored, decode),
                "attend_prefill": (qkv, stored, prefill),
                "attend_image": (patches, image_cos, image_sin, 2, 2),
            }[name]
            result = getattr(operations, name)(*arguments)
            results.append([*(result if isinstance(result, tuple) else [result]), stored])
        _compare(name, *results)
    weight, bias = random(64, 96), random(64)
    for gated in (False, True):
        linears = [operations.linear(weight, None if gated else bias, gated) for operations in (ours, theirs)]
        _compare("product", [linears[0](x)], [linears[1](x)])


def _compare(name: str, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if not torch.allclose(one.float(), other.float(), rtol=TOLERANCE, atol=TOLERANCE):
            raise KernelError(f"the results of {name} differ from torch's")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
