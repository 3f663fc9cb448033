"""A card that is not there: tensors on `cuda` without memory, whose live bytes are counted.

FakeTensorMode computes shapes only. A build of torch for the CPU lacks a few things on such tensors (indexing, copies from
the host, resampling); `Card` does them another way, and computes attention as the fused kernels do, without a matrix of
scores. It counts every storage on the card for as long as a tensor needs it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from api.engine.model.linear import Role, TorchLinear
from api.engine.model.operations import TorchOperations
from api.engine.model.quantized_linear import FLOAT8, FUSED_ROWS, NF4_BLOCK, SCRATCH_BYTES, Fp8Linear, Int8Linear

CUDA = torch.device("cuda", 0)


class Counter(TorchDispatchMode):
    """Bytes of the storages on the card: now, and at most since `reset_peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.peak = 0
        self.paused = False
        self._known: set[int] = set()

    def host_view(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Stands for api.engine.model.host_memory.device_view: on the device, but in memory of the host."""
        self.paused = True
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
        finally:
            self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not self.paused and isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // 512) * 512  # as the allocator rounds
        self._known.add(key)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.allocated -= size

    def reset_peak(self) -> None:
        self.peak = self.allocated


class Substitutes(TorchFunctionMode):
    """What a build of torch for the CPU cannot do with tensors on `cuda`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and _on_card(args[0]):
            return _indexed(*args)
        if func is torch.Tensor.__setitem__ and _on_card(args[0]):
            return None  # writes, and allocates nothing
        if func is torch.Tensor.copy_ and _on_card(args[0]):
            return args[0]
        if func in (torch.Tensor.to, torch.Tensor.cuda) and not _on_card(args[0]) and _is_cuda(args[1:], kwargs):
            dtype = next(
                (each for each in (*args[1:], *kwargs.values()) if isinstance(each, torch.dtype)), args[0].dtype
            )
            return torch.empty(args[0].shape, dtype=dtype, device=CUDA)
        if func is torch.Tensor.T.__get__ and _on_card(args[0]):  # type: ignore[attr-defined]
            return args[0].transpose(0, 1)
        if func is F.grid_sample and _on_card(args[0]):
            source, at = args[:2]
            return source.new_empty(*source.shape[:2], *at.shape[1:3])
        if func is F.scaled_dot_product_attention and _on_card(args[0]):
            return _attention(*args[:3])
        if func is torch.Tensor.contiguous and _on_card(args[0]):
            return args[0] if args[0].is_contiguous() else args[0].new_empty(args[0].shape)
        return func(*args, **kwargs)


def _on_card(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"


def _is_cuda(args: Any, kwargs: Any) -> bool:
    return any(str(each).startswith("cuda") for each in (*args, *kwargs.values()))


def _indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, EllipsisType) for part in parts):
        at = next(number for number, part in enumerate(parts) if isinstance(part, EllipsisType))
        missing = tensor.ndim - sum(part is not None for part in parts) + 1
        parts[at : at + 1] = [slice(None)] * missing
    tensors = [part for part in parts if isinstance(part, (torch.Tensor, list))]
    if len(tensors) > 1:  # one element of each for a row of the result
        return torch.ops.aten.index.Tensor(tensor, [_long(part) for part in parts])
    dimension = 0
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dimension)
        elif isinstance(part, slice):
            start, end, _ = part.indices(tensor.shape[dimension])
            tensor = tensor.narrow(dimension, start, max(end - start, 0))
        elif isinstance(part, int):
            tensor = tensor.select(dimension, part)
            continue
        else:
            tensor = tensor.index_select(dimension, _long(part))
        dimension += 1
    return tensor


def _long(index: Any) -> torch.Tensor:
    return index if isinstance(index, torch.Tensor) else torch.empty(len(index), dtype=torch.long, device=CUDA)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The result and a logarithm for each row, as the flash kernel allocates them, tokens before heads."""
    q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1]).transpose(-3, -2)


class PretendedOperations(TorchOperations):
    """The operations on CUDA: kernels are replaced by what they allocate."""

    needs_masks = False

    def linear(self, weight: Any, bias: Any = None, gated: bool = False, role: Role = "text") -> Any:
        return self.recipe.linear(role, weight, bias, gated, LINEARS)

    def add_norm(self, x: Any, delta: Any, delta_norm: Any, next_norm: Any, eps: float, following: Any = None) -> Any:
        return torch.empty_like(x), torch.empty_like(x)

    def rotate_store(self, qkv: Any, *args: Any) -> Any:
        return qkv

    def attend_decode(self, qkv: Any, kv: Any, metadata: Any) -> Any:
        return qkv.new_empty(len(qkv), (qkv.shape[1] - kv.shape[1]) * qkv.shape[2])

    attend_prefill = attend_decode

    def attend_image(self, qkv: Any, cos: Any, sin: Any, frames: int, heads: int) -> Any:
        q, k, v = torch.empty_like(qkv).view(frames, -1, 3, heads, cos.shape[-1]).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(qkv), -1)


class _Plain(TorchLinear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return _gated(y) if self._gated else y


class _Float8(Fp8Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values, scales = x.new_empty(x.shape, dtype=FLOAT8), x.new_empty(len(x), 1, dtype=torch.float32)
        y = x.new_empty(len(x), self.out_features)  # of the product; scales are applied to a copy
        del values, scales
        return y.new_empty(len(y), self.out_features // 2 if self._gated else self.out_features)


class _Nf4:
    """Packed by bitsandbytes, whose operators know no pretended tensors."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias, self._gated = bias, gated
        self._packed = weight.new_empty(weight.numel() // 2, 1, dtype=torch.uint8)
        self._scales = weight.new_empty(weight.numel() // NF4_BLOCK, dtype=torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(len(x), self.out_features)
        if len(x) > FUSED_ROWS:
            x.new_empty(SCRATCH_BYTES // 2, dtype=torch.bfloat16)
        return _gated(y) if self._gated else y


def _gated(y: torch.Tensor) -> torch.Tensor:
    return y.new_empty(len(y), y.shape[1] // 2)


LINEARS = {"plain": _Plain, "fp8": _Float8, "int8": Int8Linear, "nf4": _Nf4}


@contextmanager
def pretended_card() -> Iterator[Counter]:
    counter = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True), counter, Substitutes(), torch.no_grad():
        yield counter


class PretendedSource:
    """Weights of the given shapes on the card, made as they are asked for."""

    def __init__(self, config: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> None:
        self.config, self.device, self.dtype = config, CUDA, dtype
        self._shapes = shapes

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        return torch.empty(self._shapes[name], dtype=self.dtype, device="cpu" if on_host else CUDA)

    def find(self, name: str) -> torch.Tensor | None:
        return self.take(name) if name in self._shapes else None
