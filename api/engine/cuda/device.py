"""Streams, events, pinned memory and graphs of a device: all that a test without a card has to replace.

The engine thread queues work on one stream and waits in one place a step. Whatever else needs the device from the host goes
through here, so that a hidden wait is a bug that a test can find.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """A point in the work that has been queued."""

    def wait(self) -> None:
        """Return once the device has reached it."""

    def done(self) -> bool: ...

    def seconds_since(self, earlier: Event) -> float:
        """Time of the device between two points. Both must have been reached."""


class Device(Protocol):
    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host [size] that the device copies from and to by itself."""

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of pinned memory to the device."""

    def send(self, source: torch.Tensor, place: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A copy of host memory of any kind on the device, queued through pinned memory of its own."""

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy to pinned memory; an event recorded after it tells when it is there."""

    def record(self) -> Event:
        """A point after all that has been queued so far."""

    def check(self) -> None:
        """Wait for all that has been queued. Raises if the device can compute no more."""

    def release(self) -> None:
        """Give unused memory back to the driver."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once, record it, and return what queues it again: the same operations on the same memory.

        `work` must not wait for the device, nor read anything of the host that changes. Raises RuntimeError.
        """


class CudaEvent:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def done(self) -> bool:
        return self._event.query()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        return earlier._event.elapsed_time(self._event) / 1000


class CudaDevice:
    """A CUDA device through torch. All graphs share one pool of memory, because one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()  # one for all captures: libraries keep room for each stream

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def send(self, source: torch.Tensor, place: torch.device, dtype: torch.dtype) -> torch.Tensor:
        pinned = torch.empty(source.shape, dtype=dtype, pin_memory=True)
        # Torch's allocator gives the pinned memory to nobody else before the copy is done.
        return pinned.copy_(source).to(place, non_blocking=True)

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        return CudaEvent()

    def check(self) -> None:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        current, side = torch.cuda.current_stream(), self._side
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiles kernels and lets libraries allocate what they keep
            work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            work()
        return graph.replay
