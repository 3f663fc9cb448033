"""A CUDA device without memory: FakeTensorMode has shapes, number formats and devices, and no numbers.

Whatever waits for the device, or copies between host and device without going through `Device`, raises. Indexing and
`copy_` ask CPU builds of torch for a CUDA device before the mode sees them, so they are sent to it by another way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

PLACE = torch.device("cuda", 0)


class HiddenCopy(AssertionError):
    pass


class _Rerouted(TorchFunctionMode):
    def __init__(self, strict: bool) -> None:
        super().__init__()
        self._strict = strict

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        name = getattr(func, "__name__", "")
        if not fakes:
            if name == "to" and any(getattr(torch.device(a), "type", "") == "cuda" for a in args[1:] if isinstance(a, (str, torch.device))):
                return self._transfer(args[0], kwargs.get("dtype") or next((a for a in args[1:] if isinstance(a, torch.dtype)), None))
            made_there = "cuda" in str(kwargs.get("device", "")) or any("cuda" in str(a) for a in args if isinstance(a, torch.device))
            if made_there:
                return func(*args, **kwargs)
            with unset_fake_temporarily():  # pinned memory, and what is only on the host
                return func(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            return self._index(*args)
        if func is torch.Tensor.__setitem__:
            target, index, value = args
            return self._copy(self._index(target, index), value)
        if func is torch.Tensor.copy_:
            return self._copy(*args[:2])
        if name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero", "pin_memory"):
            raise HiddenCopy(f"{name} waits for the device")
        if name == "to" and any(str(a).startswith("cpu") for a in args[1:]):
            raise HiddenCopy("a copy to the host")
        return func(*args, **kwargs)

    def _copy(self, target: Any, source: Any) -> Any:
        if not isinstance(source, FakeTensor) or source.device != target.device:
            raise HiddenCopy(f"a copy from {getattr(source, 'device', type(source))} to {target.device}")
        torch.broadcast_shapes(target.shape, source.shape)
        return target

    def _transfer(self, source: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        if self._strict:
            raise HiddenCopy(f"a pageable copy of {tuple(source.shape)} to the device")
        return torch.empty(source.shape, dtype=dtype or source.dtype, device=PLACE)

    def _index(self, tensor: torch.Tensor, index: Any) -> torch.Tensor:
        """tensor[index] by operations that the mode sees."""
        dimension = 0
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, int):
                tensor = torch.select(tensor, dimension, part)
            elif part is None:
                tensor = tensor.unsqueeze(dimension)
                dimension += 1
            elif part is Ellipsis:
                dimension = tensor.ndim
            elif isinstance(part, slice):
                assert part.step in (None, 1)
                tensor = torch.ops.aten.slice(tensor, dimension, part.start, part.stop)
                dimension += 1
            elif isinstance(part, FakeTensor):
                parts = index if isinstance(index, tuple) else (index,)
                return torch.ops.aten.index(tensor, list(parts))
            elif isinstance(part, list) and not self._strict:
                tensor = tensor.index_select(dimension, torch.empty(len(part), dtype=torch.int64, device=PLACE))
                dimension += 1
            else:
                raise HiddenCopy(f"an index of the host: {part}")
        return tensor


@contextlib.contextmanager
def fake_card(strict: bool = True) -> Iterator[None]:
    """`strict`: raise at pageable copies to the device too, which loading may make."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Rerouted(strict):
        yield


class FakeMoment:
    def wait(self) -> None: ...

    def done(self) -> bool:
        return True

    def seconds_since(self, earlier: Any) -> float:
        return 0.01


class FakeDevice:
    """Counts what goes over the bus."""

    def __init__(self) -> None:
        self.uploads = self.downloads = self.sent = self.waits = 0

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.device.type == "cuda" and source.device.type == "cpu"
        assert target.shape == source.shape and target.dtype == source.dtype
        self.uploads += 1

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.device.type == "cpu" and source.device.type == "cuda"
        assert target.shape == source.shape and target.dtype == source.dtype
        self.downloads += 1

    def send(self, source: torch.Tensor, place: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self.sent += 1
        return torch.empty(source.shape, dtype=dtype, device=place)

    def record(self) -> FakeMoment:
        return FakeMoment()

    def check(self) -> None: ...

    def release(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


class FakeSource:
    """The weights of a network on a device that has no memory for them."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = network.config, PLACE, dtype
        self._shapes = {name: tuple(t.shape) for name, t in network.named_parameters(remove_duplicate=False)}

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        return torch.empty(self._shapes[name], dtype=self.dtype, device=PLACE)

    def find(self, name: str) -> torch.Tensor | None:
        return self.take(name) if name in self._shapes else None


