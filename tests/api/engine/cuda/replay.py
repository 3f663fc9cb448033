"""A device that is none: work runs at once on the CPU, and graphs are replayed from a tape as a card replays them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """Every operation with the tensors that it used: a replay uses the same memory, and no code of ours runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any, list[bool]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in WAITS, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs)) if not t.is_mkldnn}
        # A result in memory of its own is written again; others are views, or were written in place.
        fresh = [t.untyped_storage().data_ptr() not in held for t in _tensors(out)]
        self.calls.append((func, args, kwargs or {}, out, fresh))
        return out

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, out, fresh in self.calls:
                again = _tensors(func(*args, **kwargs))
                for old, new, copied in zip(_tensors(out), again, fresh, strict=True):
                    if copied:
                        old.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Moment:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def seconds_since(self, earlier: Moment) -> float:
        return self.at - earlier.at


class ReplayDevice:
    def __init__(self) -> None:
        self.replays = 0

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def send(self, source: torch.Tensor, place: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return source.to(dtype)

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def record(self) -> Moment:
        return Moment()

    def check(self) -> None: ...

    def release(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        with Tape() as tape:
            work()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay
