"""Loads the weights of a checkpoint into a runner, at the start and again while it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from api.engine.kernels.build import cache_folder
from api.engine.loaded_model import LoadError
from api.engine.loading.packed import FOLDER, Packed, PackedFile, Recorder, Replay, packing_facts
from api.engine.loading.progress import Progress, part, unseen
from api.engine.loading.revision import revision_of
from api.engine.loading.safetensors_source import Checkpoint, SafetensorsSource
from api.engine.model.operations import Operations
from api.engine.model.quantized_linear import bitsandbytes_ops
from api.engine.model.recipe import BF16
from api.engine.model.weight_source import WeightSource
from api.engine.process import release_freed_memory

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


@dataclass(frozen=True)
class Weights:
    """A checkpoint, to be computed on `device` in `dtype`."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    def load(
        self,
        operations: Operations,
        make: Callable[[WeightSource], Made],
        progress: Progress = unseen,
    ) -> tuple[Made, str]:
        """What `make` makes of a source that it takes every tensor from, with products of `operations`; and where the
        weights came from, in words. Quantised ones are kept in a file and read from there the next time.

        Raises LoadError if the files do not fit the config, or hold tensors that `make` has not taken.
        """
        self.checkpoint.read_headers()
        if operations.recipe == BF16:
            with self._open(progress) as source:
                return make(source), "from the checkpoint, which is no larger than what is kept of it"
        if "nf4" in (operations.recipe.text, operations.recipe.head):
            _need_bitsandbytes()
        packed = self._packed(operations)
        if (file := packed.read()) is not None:
            try:
                return self._replay(operations, make, file, progress), f"quantised before, in {packed.path}"
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # damaged: the checkpoint decides
                packed.remove(f"{type(error).__name__}: {error}")
        return self._record(operations, make, packed, progress)

    def _replay(
        self, operations: Operations, make: Callable[[WeightSource], Made], file: PackedFile, progress: Progress
    ) -> Made:
        with self._open(progress) as source:
            replay = Replay(source, operations.recipe, file)
            try:
                with _recipe_of(operations, replay):
                    return make(replay)
            finally:
                replay.close()

    def _record(
        self, operations: Operations, make: Callable[[WeightSource], Made], packed: Packed, progress: Progress
    ) -> tuple[Made, str]:
        reading, writing = part(progress, 0.0, 0.8), part(progress, 0.8, 1.0)
        with self._open(reading) as source:
            recorder = Recorder(source, operations.recipe)
            with _recipe_of(operations, recorder):
                made = make(recorder)
        total = sum(tensor.nbytes for linear in recorder.linears for tensor in linear.parts)
        written = 0
        try:
            for count in packed.write(recorder):
                written += count
                writing(written / total)
        except (OSError, ValueError) as error:
            logger.warning("event=packed_not_kept file=%s reason=%s", packed.path, error)
            return made, f"quantised at this start, and not kept for the next: {error}"
        logger.info("event=packed_kept file=%s bytes=%d", packed.path, total)
        return made, f"quantised at this start; the next reads {packed.path}"

    @contextmanager
    def _open(self, progress: Progress) -> Iterator[SafetensorsSource]:
        source = SafetensorsSource(self.checkpoint, self.device, self.dtype, progress)
        try:
            yield source
        finally:
            source.close()
            release_freed_memory()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
        if rest := source.untaken():
            folder = self.checkpoint.folder
            raise LoadError(f"{folder}: the engine does not know what these weights are for: {', '.join(rest[:8])}")

    def _packed(self, operations: Operations) -> Packed:
        """Beside the checkpoint, or in the cache folder if that cannot be written."""
        folder, revision = self.checkpoint.folder, revision_of(self.checkpoint.folder)
        kept = folder / FOLDER if os.access(folder, os.W_OK) else cache_folder() / "packed" / revision
        facts = packing_facts(revision, operations.recipe, self.dtype, self.device)
        return Packed(kept, operations.recipe, facts)


def _need_bitsandbytes() -> None:
    try:
        bitsandbytes_ops()
    except Exception as error:  # not only ImportError: its library may not fit the driver
        raise LoadError(
            f"4-bit weights need the package bitsandbytes ({type(error).__name__}: {error}). ./start.sh installs it; by "
            "hand: pip install -r requirements-quantized.txt. Without it: GLM_WEIGHTS=bf16, or fp8 on newer cards."
        ) from None


@contextmanager
def _recipe_of(operations: Operations, recipe: Recorder | Replay) -> Iterator[None]:
    """`operations` make their products by `recipe` for a while."""
    own = operations.recipe
    operations.recipe = recipe  # type: ignore[assignment]
    try:
        yield
    finally:
        operations.recipe = own
