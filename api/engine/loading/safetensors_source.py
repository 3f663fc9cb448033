"""The weights of a checkpoint's folder, read tensor by tensor as the model asks for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from api.engine.loaded_model import LoadError
from api.engine.loading.families import FAMILIES, shapes_of
from api.engine.loading.progress import Progress, unseen
from api.engine.loading.safetensors_file import SafetensorsFile, TensorReader

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
# Names of older checkpoints, and of those saved by other versions of transformers.
RENAMED = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.(model\.)?"), "model.language_model."),
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)
NAMED = 4  # tensors that an error names of each kind


class Checkpoint:
    """The tensors of a folder's safetensors files, by the names that transformers gives them today, checked against the
    shapes that the config asks for. Reads headers only. Raises LoadError that names all that does not fit."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.config = folder, config
        self.shapes = shapes_of(config)
        self.tied = HEAD not in self.shapes  # the head is the table of embeddings
        self.read_headers()

    def read_headers(self) -> None:
        """Look at the files again."""
        self.tensors: dict[str, tuple[SafetensorsFile, str]] = {}  # file, and the name in it
        for path in weight_files(self.folder):
            file = SafetensorsFile(path)
            self.tensors |= {_name(stored): (file, stored) for stored in file.tensors}
        ignored = FAMILIES[self.config.model_type].ignored
        for name in [name for name in self.tensors if ignored and re.match(ignored, name)]:
            del self.tensors[name]
        if self.tied:
            self.tensors.pop(HEAD, None)
        if problems := list(self._problems()):
            raise LoadError(f"{self.folder}: the weights do not fit config.json: {'; '.join(problems)}")

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def nbytes(self, name: str) -> int:
        file, stored = self.tensors[name]
        return file.tensors[stored].nbytes

    def _problems(self) -> Iterable[str]:
        if missing := [name for name in self.shapes if name not in self.tensors]:
            yield f"missing: {_some(missing)}"
        if unknown := [name for name in self.tensors if name not in self.shapes]:
            yield f"unknown: {_some(unknown)}"
        odd, formats = [], []
        for name, (file, stored) in self.tensors.items():
            tensor = file.tensors[stored]
            if name in self.shapes and tensor.shape != self.shapes[name]:
                odd.append(f"{name} {list(tensor.shape)} instead of {list(self.shapes[name])}")
            if tensor.dtype not in FLOATS:
                formats.append(f"{name} {tensor.dtype}")
        if odd:
            yield f"of another shape: {_some(odd)}"
        if formats:
            yield f"in a number format other than {', '.join(FLOATS)}: {_some(formats)}"


class SafetensorsSource:
    """A WeightSource: each `take` reads a tensor to the device and casts it there. To be closed, which says whether the
    model has asked for all of them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        progress: Progress = unseen,
    ) -> None:
        self.config: Any = checkpoint.config
        self.device, self.dtype = torch.device(device), dtype
        self._checkpoint, self._progress = checkpoint, progress
        self._taken: set[str] = set()
        self._read, self._total = 0, sum(checkpoint.nbytes(name) for name in checkpoint.tensors)
        if checkpoint.tied:
            self._total += checkpoint.nbytes(EMBEDDINGS)
        self._reader = TensorReader(self.device, self.came)

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        name = self._stored(name)
        file, stored = self._checkpoint.tensors[name]
        self._taken.add(name)
        tensor = self._reader.read(file, stored, torch.device("cpu") if on_host else None)
        return tensor.to(self.dtype)

    def find(self, name: str) -> torch.Tensor | None:
        return self.take(name) if name in self._checkpoint.tensors else None

    def close(self) -> None:
        self._reader.close()

    def _stored(self, name: str) -> str:
        return EMBEDDINGS if name == HEAD and self._checkpoint.tied else name

    def untaken(self) -> list[str]:
        """Tensors of the checkpoint that nobody asked for: the model would compute something else than it was trained to."""
        return [name for name in self._checkpoint.tensors if name not in self._taken]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shapes[self._stored(name)]

    def replace(self, names: Iterable[str], nbytes: int) -> None:
        """These tensors will come from elsewhere, with so many bytes."""
        names = {self._stored(name) for name in names}
        self._taken |= names
        self._total += nbytes - sum(self._checkpoint.nbytes(name) for name in names)

    def came(self, count: int) -> None:
        """So many bytes have been read."""
        self._read += count
        self._progress(min(self._read / self._total, 1.0))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or else all. Raises LoadError."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files and (others := sorted(path.name for path in folder.glob("*.bin"))):
            raise LoadError(
                f"{folder}: only *.safetensors are loaded, because other files can run code. Found: {others[0]}. "
                "Take a revision with safetensors, or convert it: load it with transformers and call save_pretrained."
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise LoadError(f"{index}: cannot be read: {error}") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise LoadError(f"{folder}: {INDEX} names files that are missing: {_some(missing)}. Download them again.")
    return [folder / name for name in names]


def _name(stored: str) -> str:
    for pattern, name in RENAMED:
        stored, count = pattern.subn(name, stored, count=1)
        if count:
            break
    return stored


def _some(items: list[str]) -> str:
    rest = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + rest
