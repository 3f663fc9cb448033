"""Host memory that a GPU reads: for what is large and of which a step needs a few rows."""

from __future__ import annotations

from typing import Any

import torch


class _Registered:
    """Memory of a tensor, registered with the driver for as long as this object lives."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._memory = tensor.detach().contiguous()
        # Registered and not pinned by torch's allocator, which rounds up to a power of two.
        status = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0)
        if int(status):
            raise MemoryError(f"{self._memory.nbytes} bytes of host memory cannot be registered (CUDA error {status})")
        words = self._memory.view(torch.int16)
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(words.shape), "typestr": "<i2", "data": (words.data_ptr(), False), "version": 2,
        }  # fmt: skip

    def __del__(self) -> None:
        if hasattr(self, "__cuda_array_interface__"):
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())


def device_view(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CUDA device over the memory of a tensor [rows, columns] of the host, with elements of 2 or 4 bytes.

    Kernels, also those in CUDA graphs, read it over the bus: rows can be selected without a copy of the rest. Raises
    MemoryError if the driver does not register the memory.
    """
    with torch.cuda.device(device):
        return torch.as_tensor(_Registered(tensor), device=device).view(tensor.dtype)
