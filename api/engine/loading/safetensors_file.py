"""Reads the tensors of a safetensors file one by one, by reads and not by a memory map: a file that is cut off or replaced
meanwhile is an error and not the end of the process, and no more than one tensor is in memory.

The format: 8 bytes little endian with the length of the header, the header as JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from api.engine.loaded_model import LoadError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
MAX_HEADER_BYTES = 100 * 2**20
PIECE_BYTES = 64 * 2**20  # read before it is copied on; there are two of them, in pinned memory, for a GPU
READ_BYTES = 16 * 2**20  # of one read; several run at once, because one does not use all of a fast disk
READERS = 4


@dataclass(frozen=True)
class StoredTensor:
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # in the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class SafetensorsFile:
    """The header of a file. Raises LoadError if it is cut off or no such file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
                if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                    raise LoadError(f"{path}: no safetensors file, or cut off in its header ({size} bytes)")
                header: dict[str, Any] = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.tensors = {name: _stored(entry, 8 + length) for name, entry in header.items()}
        except OSError as error:
            raise LoadError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(f"{path}: no safetensors file: {error}") from None
        end = max((tensor.end for tensor in self.tensors.values()), default=0)
        if end > size:
            raise LoadError(f"{path}: cut off: {size} bytes, its header promises {end}. Download it again.")
        for name, tensor in self.tensors.items():
            if tensor.dtype in DTYPES and math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize != tensor.nbytes:
                raise LoadError(f"{path}: {name}: {tensor.nbytes} bytes do not fit {tensor.dtype} {list(tensor.shape)}")


def _stored(entry: dict[str, Any], base: int) -> StoredTensor:
    start, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError(f"offsets {start} to {end}")
    return StoredTensor(entry["dtype"], tuple(int(size) for size in entry["shape"]), base + start, base + end)


class TensorReader:
    """Reads tensors to a device. `read_bytes` is called with the number of bytes of each piece that has come. To be
    closed after the last one. Not for several threads."""

    def __init__(self, device: torch.device, read_bytes: Callable[[int], None] = lambda count: None) -> None:
        self._device, self._read_bytes = device, read_bytes
        self._files: dict[Path, int] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._staging: list[tuple[torch.Tensor, Any]] = []  # pinned buffers, each with the event of its last copy

    def read(self, file: SafetensorsFile, name: str, device: torch.device | None = None) -> torch.Tensor:
        """The tensor as it is stored, on `device`, by default that of the reader. Raises LoadError."""
        stored, device = file.tensors[name], device or self._device
        if stored.dtype not in DTYPES:
            raise LoadError(f"{file.path}: {name}: the number format {stored.dtype} is not supported")
        memory = torch.empty(stored.nbytes, dtype=torch.uint8, device=device)
        try:
            if device.type == "cuda":
                self._read_through_pinned_memory(file.path, stored, memory)
            else:
                for start in range(0, stored.nbytes, PIECE_BYTES):
                    self._fill(file.path, stored.start + start, memory[start : start + PIECE_BYTES])
        except OSError as error:
            raise LoadError(f"{file.path}: cannot be read: {error.strerror or error}") from None
        return memory.view(DTYPES[stored.dtype]).view(stored.shape)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self._pool:
            self._pool.shutdown()
            self._pool = None
        for _, event in self._staging:
            event.synchronize()
        self._staging.clear()

    def _read_through_pinned_memory(self, path: Path, stored: StoredTensor, memory: torch.Tensor) -> None:
        """While a piece is copied to the GPU, the next is read."""
        if not self._staging:
            buffers = (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2))
            self._staging = [(buffer, torch.cuda.Event()) for buffer in buffers]
        for start in range(0, stored.nbytes, PIECE_BYTES):
            part = memory[start : start + PIECE_BYTES]
            buffer, event = self._staging[0]
            event.synchronize()
            self._fill(path, stored.start + start, buffer[: len(part)])
            part.copy_(buffer[: len(part)], non_blocking=True)
            event.record()
            self._staging.reverse()

    def _fill(self, path: Path, offset: int, memory: torch.Tensor) -> None:
        """Read len(memory) bytes from `offset` into uint8 memory of the host."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        descriptor, view = self._files[path], memory.numpy().data
        parts = [(offset + at, view[at : at + READ_BYTES]) for at in range(0, len(view), READ_BYTES)]
        if len(parts) == 1:
            _read_exactly(descriptor, *parts[0])
        else:
            self._pool = self._pool or ThreadPoolExecutor(READERS, "weights")
            for _ in self._pool.map(lambda part: _read_exactly(descriptor, *part), parts):
                pass
        self._read_bytes(len(view))


def _read_exactly(descriptor: int, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"it ends before byte {offset + len(view)}")
        done += count


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Iterator[int]:
    """Write a safetensors file piece by piece and to the disk; yields the bytes of each piece. Tensors of any device, and
    at most a piece of them in host memory."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            memory = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, len(memory), PIECE_BYTES):
                piece = memory[start : start + PIECE_BYTES].cpu()
                file.write(piece.numpy().data)
                yield len(piece)
        file.flush()
        os.fsync(file.fileno())
