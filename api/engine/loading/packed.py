"""Quantised weights kept in a file, so that the next start reads those and not the checkpoint's, which are up to four
times as large.

The file holds the quantised matrices in the order in which the model asks for them, with a sum of each, and the names of
the checkpoint's tensors that they replace. It is written under another name and renamed when it is complete and on the
disk, so a process that dies meanwhile leaves nothing that is taken for a result.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from api.engine.loaded_model import LoadError
from api.engine.loading.safetensors_file import SafetensorsFile, TensorReader, write
from api.engine.loading.safetensors_source import EMBEDDINGS, SafetensorsSource
from api.engine.model.linear import Linear, Role
from api.engine.model.quantized_linear import QuantizedLinear
from api.engine.model.recipe import LINEARS, Linears, Recipe
from api.engine.model.weights import raw_bytes, word_sum

logger = logging.getLogger(__name__)

FOLDER = ".packed"  # in the checkpoint's
SPARE_BYTES = 2**30  # of disk that stays free
TABLES = (EMBEDDINGS, "model.visual.embeddings.position_embedding.weight")  # matrices that nothing is multiplied with
PARTS = ("values", "scales")


@dataclass(frozen=True)
class Packed:
    """Where the result of a recipe is kept. `facts`: all that it depends on; another set of them makes another file."""

    folder: Path
    recipe: Recipe
    facts: dict[str, str]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.recipe.name}.safetensors"

    def read(self) -> PackedFile | None:
        """The file, if it is there, whole and of these facts. Others are removed."""
        if not self.path.is_file():
            return None
        try:
            file = SafetensorsFile(self.path)
            if json.loads(file.metadata["facts"]) == self.facts:
                entries, replaced = json.loads(file.metadata["entries"]), json.loads(file.metadata["replaced"])
                return PackedFile(file, [Entry(**entry) for entry in entries], frozenset(replaced))
            reason = "it is of other weights or software"
        except (LoadError, KeyError, ValueError, TypeError) as error:
            reason = str(error)
        self.remove(reason)
        return None

    def remove(self, reason: str) -> None:
        logger.warning("event=packed_removed file=%s reason=%s", self.path, json.dumps(reason))
        self.path.unlink(missing_ok=True)

    def write(self, recorder: Recorder) -> Iterator[int]:
        """Yields the number of bytes of each piece written. Raises OSError, or ValueError if there is no room."""
        tensors = {
            f"{number}.{name}": part
            for number, linear in enumerate(recorder.linears)
            for name, part in zip(PARTS, linear.parts, strict=True)
        }
        metadata = {
            "facts": json.dumps(self.facts),
            "entries": json.dumps([vars(entry) for entry in recorder.entries]),
            "replaced": json.dumps(sorted(recorder.replaced)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_remains()
        needed = sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise ValueError(f"{free / 2**30:.1f} GiB of disk are free in {self.folder}, {needed / 2**30:.1f} are needed")
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as locked:  # the lock says that a process is still writing it
            fcntl.flock(locked, fcntl.LOCK_EX)
            try:
                yield from write(temporary, tensors, metadata)
                temporary.replace(self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _remove_remains(self) -> None:
        """Of writers that died."""
        for path in self.folder.glob("*.tmp"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue  # another process writes it now
                path.unlink()


@dataclass(frozen=True)
class Entry:
    """A quantised matrix in the file."""

    format: str
    out_features: int
    in_features: int
    gated: bool
    sums: list[int]  # of its parts


@dataclass(frozen=True)
class PackedFile:
    file: SafetensorsFile
    entries: list[Entry]
    replaced: frozenset[str]  # names of the checkpoint's tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.file.tensors.values())


class Recorder:
    """Passes weights on from a source to a recipe, and notes what came of them."""

    def __init__(self, source: SafetensorsSource, recipe: Recipe) -> None:
        self.config, self.device, self.dtype = source.config, source.device, source.dtype
        self.host_embeddings = recipe.host_embeddings
        self.linears: list[QuantizedLinear] = []
        self.entries: list[Entry] = []
        self.replaced: set[str] = set()
        self._source, self._recipe = source, recipe
        self._pending: list[str] = []  # matrices that were taken, and not yet given to `linear`

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        tensor = self._source.take(name, on_host)
        if tensor.ndim > 1 and name not in TABLES:
            self._pending.append(name)
        return tensor

    def find(self, name: str) -> torch.Tensor | None:
        return self._source.find(name)

    def linear(
        self, role: Role, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool, linears: Linears = LINEARS
    ) -> Linear:
        names, self._pending = self._pending, []
        made = self._recipe.linear(role, weight, bias, gated, linears)
        if isinstance(made, QuantizedLinear):
            sums = [word_sum(raw_bytes(part)) for part in made.parts]
            kind = self._recipe.format_of(role, *weight.shape)
            self.linears.append(made)
            self.entries.append(Entry(kind, made.out_features, made.in_features, gated, sums))
            self.replaced |= set(names)
        return made


class Replay:
    """Passes on a checkpoint's tensors, but matrices without values in place of those that are in the packed file, and
    makes the products of them from the file. Raises LoadError where the file does not fit."""

    def __init__(self, source: SafetensorsSource, recipe: Recipe, packed: PackedFile) -> None:
        self.config, self.device, self.dtype = source.config, source.device, source.dtype
        self.host_embeddings = recipe.host_embeddings
        self._source, self._recipe, self._packed = source, recipe, packed
        self._next = 0
        self._reader = TensorReader(source.device, source.came)
        source.replace(packed.replaced, packed.nbytes)

    def take(self, name: str, on_host: bool = False) -> torch.Tensor:
        if name in self._packed.replaced:
            return torch.empty(self._source.shape(name), dtype=self.dtype, device="meta")
        return self._source.take(name, on_host)

    def find(self, name: str) -> torch.Tensor | None:
        return self._source.find(name)

    def close(self) -> None:
        self._reader.close()

    def linear(
        self, role: Role, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool, linears: Linears = LINEARS
    ) -> Linear:
        kind = self._recipe.format_of(role, *weight.shape)
        if not weight.is_meta or kind == "plain":
            return self._recipe.linear(role, weight, bias, gated, linears)
        number, entries = self._next, self._packed.entries
        self._next += 1
        entry = entries[number] if number < len(entries) else None
        if entry is None or (entry.format, entry.out_features, entry.in_features, entry.gated) != (kind, *weight.shape, gated):
            raise LoadError(f"{self._packed.file.path}: its matrix {number} is another than the model asks for")
        values, scales = (self._reader.read(self._packed.file, f"{number}.{name}") for name in PARTS)
        if [word_sum(raw_bytes(part)) for part in (values, scales)] != entry.sums:
            raise LoadError(f"{self._packed.file.path}: its matrix {number} is damaged")
        return linears[kind](weight, bias, gated, parts=(values, scales))


def packing_facts(revision: str, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What quantised weights depend on: the checkpoint, the recipe, and the software that makes them."""
    sources = [Path(__file__), *sorted(Path(__file__).parents[1].joinpath("model").glob("*.py"))]
    code = blake2b(b"".join(path.read_bytes() for path in sources), digest_size=8).hexdigest()
    facts = {"revision": revision, "recipe": repr(recipe), "dtype": str(dtype), "device": device.type, "code": code}
    for package in ("torch", "bitsandbytes"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = ""
    return facts
