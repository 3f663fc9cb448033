"""The runner of a CUDA device: one copy to the device and one wait a step, decode steps as recorded graphs.

What a step needs of its rows travels in one block (staging.py); block tables, the token sampled last in each slot and all
buffers stay on the device (tables.py). Tokens are sampled there, unless a row's choice needs the host (sampling.py).
Engine thread only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from api.engine.cuda.device import Device, Event
from api.engine.cuda.faults import scope_of
from api.engine.cuda.graphs import Size, StepGraphs, sizes_for
from api.engine.cuda.sampling import choose_tokens, chosen_on_device, needs_no_host
from api.engine.cuda.staging import FLOAT_FIELDS, PENALTIES, TABLE_CHANGES, Staging
from api.engine.cuda.step_test import prove_steps
from api.engine.cuda.tables import DeviceTables
from api.engine.cuda.vision_pace import VisionPace
from api.engine.image_processor import PixelPatches
from api.engine.kv_cache import BlockTable, Node
from api.engine.loaded_model import Capacity, SampledToken
from api.engine.model.operations import AttentionMetadata, ForwardBatch, Operations
from api.engine.model.runner import Glm4vRunner
from api.engine.model.sampler import NOT_FINITE, has_penalty
from api.engine.model.weight_source import WeightSource
from api.engine.request import ImageInput, Request, SamplingParams
from api.engine.scheduler import Batch, Chunk, EncodeTask, Packing
from api.engine.sequence import Sequence

logger = logging.getLogger(__name__)

RESULTS = 3  # blocks of results that may be on their way
MAX_CHUNKS = 16  # of prompts in a recorded step
# Of small images that are encoded together: launching their operations one by one takes longer than computing them.
PACKED_PATCHES = 4096


@dataclass
class Flight:
    """A step that the device computes, or has computed: the `Flight` of api.engine.loaded_model."""

    sequences: tuple[Sequence, ...]  # whose next tokens it samples
    rows: list[int]  # theirs in what follows
    result: torch.Tensor  # int32 [rows], on the host once `finished` is reached
    began: Event
    finished: Event
    logits: torch.Tensor  # float32 [rows, vocabulary], until the next step is queued
    recorded: bool  # whether it was a graph

    @property
    def seconds(self) -> float:
        return self.finished.seconds_since(self.began)


@dataclass
class Computed:
    """A step that the plain runner has computed."""

    tokens: list[SampledToken]
    seconds: float


class CudaRunner(Glm4vRunner):
    """`device` is what streams, events, pinned memory and graphs go through."""

    overlaps = True
    free_rows = 128
    packing = Packing(PACKED_PATCHES)
    SPARE_PAGES = 2  # one that stays zero and one that padding rows write to
    SPARE_SLOTS = 2  # one for a probe and one for padding rows

    def __init__(
        self, source: WeightSource, capacity: Capacity, context_tokens: int, operations: Operations, device: Device
    ) -> None:
        self._graphs: StepGraphs | None = None
        self._rows = capacity.slots + 1  # sequences at once, with that of a probe
        self._chunks = min(MAX_CHUNKS, self._rows)
        self._chunk_tokens = capacity.chunk_tokens
        self._queue = device
        self._vision_pace = VisionPace()
        self.records = True  # whether recorded steps are used
        self._samples = True  # whether tokens are sampled on the device
        self.proofs: dict[str, str] = {}  # what `warm_up` has found
        self.costs: list[tuple[int, int, float]] = []
        super().__init__(source, capacity, context_tokens, operations)
        place = self._device
        self._padding_slot = self._rows
        self._staging = Staging(device, place, self._rows + self._chunks, capacity.chunk_tokens + self._rows)
        shape = (self._staging.tokens, self._decoder.embeddings.shape[1])
        self._inputs = torch.zeros(shape, dtype=self._decoder.dtype, device=place)
        self._place_spare_pages()
        rows = self._staging.rows
        self._last_tokens = torch.zeros(self._rows + 1, dtype=torch.int32, device=place)  # by slot
        self._logits = torch.zeros(rows, self._decoder.vocabulary_size, device=place)
        self._sampled = torch.zeros(rows, dtype=torch.int32, device=place)
        self._results = [device.pinned(rows, torch.int32) for _ in range(RESULTS)]
        self._flights = 0
        # Sampling parameters by slot; rows that the host chooses for are greedy here.
        self._parameters = {name: np.zeros(self._rows + 1, np.float32) for name in FLOAT_FIELDS}
        self._parameters["top_k"] = np.ones(self._rows + 1, np.int32)

    def take_weights(self, source: WeightSource) -> None:
        super().take_weights(source)
        self._forget_graphs()
        prepare = getattr(self.operations, "prepare", None)
        if prepare is not None:
            prepare(self._rows, self._decoder.heads, self._decoder.head_dim, self._decoder.device)

    def resize_kv(self, pages: int) -> None:
        super().resize_kv(pages)
        self._place_spare_pages()
        self._forget_graphs()  # they hold the addresses of the old cache

    def _place_spare_pages(self) -> None:
        """After the pages that are allocated: one stays zero, padding rows write to the other."""
        self._spare_slot = (self._padding_page + 1) * self._page_tokens  # row of the KV cache
        width = -(-self._context_tokens // self._page_tokens) + 1
        self._tables = DeviceTables(self._rows + 1, width, self._padding_page, self._device)
        self._tables.tables[self._padding_slot].fill_(self._padding_page + 1)

    def _forget_graphs(self) -> None:
        tokens = self._chunk_tokens if self.operations.ragged else 0
        self._graphs = StepGraphs(self._queue, self._record, sizes_for(self._rows, tokens))

    def release_weights(self) -> None:
        self._graphs = None
        super().release_weights()

    @property
    def graphs(self) -> StepGraphs:
        assert self._graphs is not None
        return self._graphs

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        slot, sampling = sequence.slot, sequence.request.sampling
        on_device = self._needs_no_host(sequence)
        self._parameters["temperature"][slot] = sampling.temperature if on_device else 0.0
        self._parameters["top_p"][slot] = sampling.top_p
        self._parameters["min_p"][slot] = sampling.min_p
        self._parameters["top_k"][slot] = max(sampling.top_k, 1) if on_device else 1
        # Where the host has a part, its logits stay as they are.
        self._parameters["repetition"][slot] = sampling.repetition_penalty if on_device else 1.0
        self._parameters["presence"][slot] = sampling.presence_penalty if on_device else 0.0
        self._parameters["frequency"][slot] = sampling.frequency_penalty if on_device else 0.0

    def compute(self, batch: Batch) -> list[SampledToken]:
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch) -> Flight | Computed:
        if self.observer is not None or batch.chunk_tokens + len(batch.decode) > self._staging.tokens:
            began = time.monotonic()
            return Computed(super().compute(batch), time.monotonic() - began)
        return self._launch(batch, 0)

    def launch_next(self, flight: Flight | Computed, sequences: tuple[Sequence, ...]) -> Flight | None:
        if isinstance(flight, Computed) or not flight.recorded or not all(map(self._chosen_on_device, flight.sequences)):
            return None
        return self._launch(Batch(sequences), 1)

    @torch.inference_mode()
    def encode(self, task: EncodeTask, limit_s: float) -> list[torch.Tensor] | None:
        """Queues as many blocks as fit into `limit_s` of the device, by what earlier slices took there."""
        tower = self._vision_encoder
        began = self._queue.record()
        if task.state is None:
            images = task.images.values()
            starts = np.cumsum([0, *(rows * columns for i in images for _, rows, columns in [i.grid] * i.grid[0])])
            task.state = tower.begin_several(
                [self._sent(image.patches) for image in images],
                [image.grid for image in images],
                self._queue.send(torch.as_tensor(starts), tower.device, torch.int32) if len(images) > 1 else None,
            )
        work = tower.block_work(task.state)
        blocks = self._vision_pace.blocks(limit_s, work, tower.blocks_left(task.state))
        features = tower.advance_blocks(task.state, blocks)
        self._vision_pace.queued(began, self._queue.record(), blocks * work)
        task.slice_s = self._vision_pace.seconds(blocks * work)
        return None if features is None else tower.features_of(task.state, features)

    def _sent(self, patches: Any) -> Any:
        """Patches on their way to the device: bytes as bytes."""
        place, dtype = self._vision_encoder.device, self._vision_encoder.dtype
        if not isinstance(patches, PixelPatches):
            return self._queue.send(torch.as_tensor(patches), place, dtype)
        pixels = self._queue.send(torch.as_tensor(patches.pixels), place, torch.uint8)
        scale = self._queue.send(torch.as_tensor(patches.scale), place, dtype)
        return replace(patches, pixels=pixels, scale=scale)

    def wait_for_slices(self) -> None:
        self._vision_pace.wait()

    @torch.inference_mode()
    def _launch(self, batch: Batch, ahead: int) -> Flight:
        """Queue a step. `ahead`: how many tokens of its sequences are not known yet; the device takes the last itself."""
        try:
            return self._queue_step(batch, ahead)
        except Exception:
            self._tables.forget()  # changes may be lost
            raise

    def _queue_step(self, batch: Batch, ahead: int) -> Flight:
        began = self._queue.record()
        tokens, size = batch.chunk_tokens, self._size_of(batch)
        decoding = len(batch.decode) if size is None else size.rows if size.kind == "decode" else self._rows
        decoding = decoding if batch.decode else 0  # rows of decoding sequences, with those that pad them
        lasts = sum(chunk.is_last for chunk in batch.chunks)
        rows = [*range(len(batch.decode)), *range(decoding, decoding + lasts)]
        self._count_tokens(batch, ahead)
        self._staging.next_block()
        self._stage_rows(batch, rows, ahead)
        self._pad_rows(len(batch.decode), decoding)
        if batch.chunks:
            self._stage_tokens(batch, decoding)
            if size is not None:
                self._pad_rows(decoding + lasts, decoding + self._chunks)
                self._pad_tokens(batch, decoding, size)
                tokens = size.rows
        self._send(batch, decoding + tokens if batch.chunks else 0)
        if batch.chunks:
            self._embed(batch, decoding, tokens)
        if size is not None:
            self.graphs.replay(size)
        elif batch.chunks:
            self._run_operations(batch, rows)
        else:
            self._decode(decoding)
        end = rows[-1] + 1 if rows else 0
        self._flights = (self._flights + 1) % RESULTS
        result = self._results[self._flights][:end]
        if rows:
            self._queue.download(result, self._sampled[:end])
        return Flight(batch.sampled, rows, result, began, self._queue.record(), self._logits, size is not None)

    def _size_of(self, batch: Batch) -> Size | None:
        """The recorded step for a batch."""
        if not self.records:
            return None
        if not batch.chunks:
            return self.graphs.find("decode", len(batch.decode))
        if len(batch.chunks) > self._chunks:
            return None
        return self.graphs.find("mixed" if batch.decode else "prompt", batch.chunk_tokens)

    @torch.inference_mode()
    def collect(self, flight: Flight | Computed) -> list[SampledToken]:
        """Wait for a step; returns its tokens. Raises GrammarViolation."""
        if isinstance(flight, Computed):
            return flight.tokens
        flight.finished.wait()
        self._vision_pace.learn()
        result = flight.result.tolist()
        tokens = [result[row] for row in flight.rows]
        sampled = [
            SampledToken(0, finite=False) if token == NOT_FINITE else SampledToken(token) for token in tokens
        ]
        # Known only now: the token before may have brought a grammar into force, or forced the next one.
        rows = [row for row, sequence in enumerate(flight.sequences) if self._needs_logits(sequence)]
        if rows:
            logits = flight.logits[[flight.rows[row] for row in rows]]
            theirs = self.sample_on_host(logits, tuple(flight.sequences[row] for row in rows))
            for row, token in zip(rows, theirs, strict=True):
                sampled[row] = token
        return sampled

    def settle(self, flight: Flight | Computed) -> None:
        if isinstance(flight, Flight):
            flight.finished.wait()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs every kind of step over the spare page, records the steps, and compares them with the same operations one
        by one. What is not recorded here, for want of memory, is never recorded."""
        super().warm_up()
        self._measure_vision()
        sequence = self._warm_up_sequence()
        for start, end in ((0, 4), (4, 6), (6, 7)):
            self.collect(self.launch(Batch((), (Chunk(sequence, start, end),))))
        sequence.append(0)
        sequence.computed = 7
        self.collect(self.launch(Batch((sequence,))))
        while self.prepare_next():
            pass
        self._prove()

    def _prove(self) -> None:
        """Uses only what is right on this device."""
        if self.graphs.off is None:
            proof = prove_steps(self, self._rows, self._pages, self._page_tokens, self._decoder.vocabulary_size)
            found = f"{proof.steps} sizes compared, the largest relative difference is {proof.difference:.4f}"
            self.proofs["recorded steps"] = f"off: {proof.recorded}" if proof.recorded else f"used: {found}"
            self.proofs["sampling"] = f"off: {proof.sampled}" if proof.sampled else f"used: {proof.tokens} tokens compared"
            self.costs = proof.costs
            if proof.recorded:
                self.graphs.switch_off(proof.recorded)
                self.costs = []  # operation by operation steps take longer
            self._samples = proof.sampled is None
        else:
            self.proofs["recorded steps"] = f"off: {self.graphs.off}"
        for name, found in self.proofs.items():
            level = logging.WARNING if found.startswith("off") else logging.INFO
            logger.log(level, "event=proof path=%s found=%s", json.dumps(name), json.dumps(found))

    def sample_on_host(self, logits: torch.Tensor, sequences: tuple[Sequence, ...]) -> list[SampledToken]:
        return self._sampler.sample(logits, sequences, [self._needs_no_host(sequence) for sequence in sequences])

    def has_counted(self, sequence: Sequence) -> bool:
        return not has_penalty(sequence.request.sampling) or self._sampler.has_counted(sequence)

    def _measure_vision(self) -> None:
        """Encode images without content, a small and a larger one, until the pace is known."""
        tower = self._vision_encoder
        for turn in range(6):
            side = tower.merge * (4, 12)[turn % 2]
            patches = np.zeros((side * side, tower.patch_size), dtype=np.float32)
            task = EncodeTask({("", b""): ImageInput(patches, (1, side, side), side * side // tower.merge**2)})
            while self.encode(task, 1.0) is None:
                pass
            self._vision_pace.wait()
            if turn < 2:  # kernels were compiled and libraries prepared
                self._vision_pace = VisionPace()
        tower.drop_tables()

    @torch.inference_mode()
    def prepare_next(self) -> bool:
        """Record one more step; False if none is left."""
        self._stage_nothing()
        try:
            return self.graphs.capture_next()
        except Exception as error:
            self._queue.check()  # an operation that cannot be recorded is an error of CUDA, too, and harms nothing
            reason = f"{type(error).__name__}: {error}"
            if scope_of(error) == "memory":
                self._queue.release()
                self.graphs.stop_recording(reason)
            else:
                self.graphs.switch_off(reason)
            return False

    def failure(self, error: BaseException) -> Literal["request", "memory", "device"]:
        scope = scope_of(error)
        if scope == "memory":
            self._queue.release()
        return scope

    def close(self) -> None:
        self.release_weights()
        del self._kv, self._tables, self._staging, self._inputs, self._logits, self._last_tokens, self._sampled, self._sampler
        self._queue.release()

    # What the host tells the device.

    def _count_tokens(self, batch: Batch, ahead: int) -> None:
        """For penalties: the device itself counts the inputs of decoding sequences; the host all before them, which are
        counted already unless something went wrong, and tokens that a grammar has forced."""
        for sequence in batch.decode:
            if has_penalty(sequence.request.sampling):
                self._sampler.leave_input(sequence, ahead)
        forced = [c.sequence for c in batch.chunks if c.sequence.output_ids and has_penalty(c.sequence.request.sampling)]
        if forced:
            self._sampler.count(forced)

    def _stage_rows(self, batch: Batch, rows: list[int], ahead: int) -> None:
        host, decode, sampled = self._staging.host, batch.decode, batch.sampled
        slots = np.array([sequence.slot for sequence in sampled], dtype=np.int64)
        host["given"][: len(decode)] = -1 if ahead else [sequence.output_ids[-1] for sequence in decode]
        host["length"][: len(decode)] = [sequence.computed + ahead + 1 for sequence in decode]
        host["position"][: len(decode)] = [sequence.computed + ahead + sequence.state.delta for sequence in decode]
        host["slot"][rows] = slots
        for name, values in self._parameters.items():
            host[name][rows] = values[slots]
        numbers = [len(sequence.output_ids) + ahead + 1 for sequence in sampled]
        host["random"][rows] = self._sampler.random_numbers(slots, numbers)

    def _pad_rows(self, start: int, end: int) -> None:
        """Rows that write to the spare page and are read by nobody."""
        host, padding = self._staging.host, slice(start, end)
        host["slot"][padding] = self._padding_slot
        host["length"][padding] = 1
        host["top_k"][padding] = 1
        for name in ("given", "position", "random", *FLOAT_FIELDS):
            host[name][padding] = 1 if name == "repetition" else 0

    def _stage_tokens(self, batch: Batch, decoding: int) -> None:
        """Facts of each token: those of decoding sequences, up to row `decoding`, then those of chunks."""
        host, count = self._staging.host, len(batch.decode)
        host["ids"][:decoding] = host["given"][:decoding]
        host["kv_slots"][:count] = [self._slot_of(s, s.computed) for s in batch.decode]
        host["kv_slots"][count:decoding] = self._spare_slot
        for axis in ("time", "height", "width"):
            host[axis][:decoding] = host["position"][:decoding]
        host["sampled_rows"][:decoding] = np.arange(decoding)
        row, sampled = decoding, decoding
        for number, chunk in enumerate(batch.chunks):
            sequence, end = chunk.sequence, row + chunk.end - chunk.start
            host["start"][number], host["first"][number] = row - decoding, chunk.start
            host["chunk_slot"][number] = sequence.slot
            host["ids"][row:end] = sequence.token_ids[chunk.start : chunk.end]
            for axis, positions in zip(("time", "height", "width"), sequence.state.between(chunk.start, chunk.end), strict=True):
                host[axis][row:end] = positions
            host["kv_slots"][row:end] = self._slot_mapping(sequence, chunk.start, chunk.end)
            row = end
            if chunk.is_last:
                host["sampled_rows"][sampled] = row - 1
                sampled += 1

    def _pad_tokens(self, batch: Batch, decoding: int, size: Size) -> None:
        """Chunks without tokens, and tokens that are written to the spare page."""
        host, end = self._staging.host, decoding + batch.chunk_tokens
        padding = slice(end, decoding + size.rows)
        for name in ("ids", "time", "height", "width"):
            host[name][padding] = 0
        host["kv_slots"][padding] = self._spare_slot
        lasts = decoding + sum(chunk.is_last for chunk in batch.chunks)
        host["sampled_rows"][lasts : decoding + self._chunks] = 0
        missing = slice(len(batch.chunks), self._chunks + 1)
        host["start"][missing] = batch.chunk_tokens
        host["first"][missing] = 0
        host["chunk_slot"][missing] = self._padding_slot

    def _stage_nothing(self) -> None:
        """A step of padding, for what is recorded: its numbers must be valid."""
        self._staging.next_block()
        self._pad_rows(0, self._staging.rows)
        self._pad_tokens(Batch(), 0, Size("prompt", self._staging.tokens))
        self._staging.host["sampled_rows"][:] = 0
        self._staging.upload(0, self._staging.tokens)

    def _send(self, batch: Batch, tokens: int) -> None:
        """Queue the copy of the block, and the changes of block tables in it."""
        changes = [change for sequence in batch.sequences if (change := self._tables.changes(sequence)) is not None]
        indices, pages = (np.concatenate(parts) for parts in zip(*changes, strict=True)) if changes else ((), ())
        start = 0
        while True:
            host, count = self._staging.host, min(len(indices) - start, TABLE_CHANGES)
            host["changed"][:count] = indices[start : start + count]
            host["pages"][:count] = pages[start : start + count]
            last = start + count == len(indices)
            self._staging.upload(count, tokens if last else 0)
            if count:
                device = self._staging.device
                self._tables.tables.view(-1).index_copy_(0, device["changed"][:count].long(), device["pages"][:count])
            if last:
                return
            start += count
            self._staging.copy_to_next_block()

    # What the device does.

    def _record(self, size: Size) -> None:
        """A step of a size from the buffers alone: what a graph records."""
        if size.kind == "decode":
            self._decode(size.rows)
        else:
            self._prefill(0 if size.kind == "prompt" else self._rows, size.rows)

    def _decode(self, rows: int) -> None:
        staged = {name: field[:rows] for name, field in self._staging.device.items()}
        slots, lengths = staged["slot"], staged["length"]
        last = self._last_tokens.index_select(0, slots)
        tokens = torch.where(staged["given"] >= 0, staged["given"], last)
        tables = self._tables.tables.index_select(0, slots)
        at = (lengths - 1).long()
        self._sampler.count_inputs(slots, tokens)
        pages = tables.gather(1, (at // self._page_tokens)[:, None])[:, 0]
        kv_slots = pages.long() * self._page_tokens + at % self._page_tokens
        self._finish(rows, ForwardBatch(
            self._decoder.embeddings.index_select(0, tokens), *self._decoder.rotary.tables, kv_slots,
            (AttentionMetadata(0, rows, tables, None, lengths),), None, staged["position"],
        ))  # fmt: skip

    def _prefill(self, decoding: int, tokens: int) -> None:
        """`tokens` of up to MAX_CHUNKS prompts after the rows of decoding sequences. Their embeddings are there already."""
        staged, count, tables = self._staging.device, self._chunks, self._tables.tables
        attention = [
            AttentionMetadata(
                decoding, decoding + tokens, tables.index_select(0, staged["chunk_slot"][:count]),
                starts=staged["start"][: count + 1], firsts=staged["first"][:count], max_rows=tokens,
            )
        ]  # fmt: skip
        if decoding:
            theirs = tables.index_select(0, staged["slot"][:decoding])
            self._sampler.count_inputs(staged["slot"][:decoding], staged["ids"][:decoding])
            attention.insert(0, AttentionMetadata(0, decoding, theirs, None, staged["length"][:decoding]))
        rows = decoding + count
        self._finish(rows, self._with_tokens(decoding + tokens, attention, staged["sampled_rows"][:rows]))

    def _embed(self, batch: Batch, decoding: int, tokens: int) -> None:
        """The inputs of a step with prompts: embeddings of its tokens and features of its images."""
        inputs, ids = self._inputs[: decoding + tokens], self._staging.device["ids"][: decoding + tokens]
        torch.index_select(self._decoder.embeddings, 0, ids, out=inputs)
        row = decoding
        for chunk in batch.chunks:
            self._insert_image_features(inputs, row, chunk)
            row += chunk.end - chunk.start

    def _run_operations(self, batch: Batch, rows: list[int]) -> None:
        """A step with prompts, operation by operation."""
        decode, staged, attention = len(batch.decode), self._staging.device, []
        if decode:
            longest = max(sequence.computed + 1 for sequence in batch.decode)
            tables = self._tables.tables.index_select(0, staged["slot"][:decode])[:, : self._pages_for(longest, 1)]
            self._sampler.count_inputs(staged["slot"][:decode], staged["ids"][:decode])
            attention.append(AttentionMetadata(0, decode, tables, None, staged["length"][:decode]))
        row = decode
        for chunk in batch.chunks:
            end = row + chunk.end - chunk.start
            table = self._tables.tables[chunk.sequence.slot, : self._pages_for(chunk.end, 1)]
            attention.append(AttentionMetadata(row, end, table, first=chunk.start))
            row = end
        indices = None if len(rows) == row else staged["sampled_rows"][: len(rows)]
        self._finish(len(rows), self._with_tokens(row, attention, indices))

    def _with_tokens(
        self, tokens: int, attention: list[AttentionMetadata], indices: torch.Tensor | None
    ) -> ForwardBatch:
        """A pass over the tokens that are staged one by one."""
        staged = self._staging.device
        positions = torch.stack([staged[axis][:tokens] for axis in ("time", "height", "width")]).long()
        cos, sin = self._decoder.rotary.at(positions)
        kv_slots = staged["kv_slots"][:tokens].long()
        return ForwardBatch(self._inputs[:tokens], cos, sin, kv_slots, tuple(attention), indices)

    def _finish(self, rows: int, batch: ForwardBatch) -> None:
        """Compute a pass; sample the next token of each of `rows`, and keep it for the next step of its slot."""
        normed = self._decoder.hidden(batch)
        if not rows:
            return
        logits = self._logits[:rows]
        logits.copy_(self._decoder.head(normed))
        staged = {name: field[:rows] for name, field in self._staging.device.items()}
        if self._penalise is not None:
            penalties = (staged[name] for name in PENALTIES)
            self._penalise(logits, self._sampler.seen, self._sampler.counts, staged["slot"], *penalties)
        sampled = choose_tokens(
            logits, staged["temperature"], staged["top_k"], staged["top_p"], staged["min_p"], staged["random"]
        )
        self._sampled[:rows].copy_(sampled)
        self._last_tokens.index_copy_(0, staged["slot"].long(), sampled.clamp(min=0))

    def _slot_of(self, sequence: Sequence, at: int) -> int:
        """Row of the KV cache that a token is written to."""
        assert sequence.block_table is not None
        return sequence.block_table.pages[at // self._page_tokens] * self._page_tokens + at % self._page_tokens

    def _warm_up_sequence(self) -> Sequence:
        """A prompt of seven tokens in the spare page."""
        request = Request("warm-up", (0,) * 7, SamplingParams(max_tokens=1))
        sequence = Sequence(request, lambda event: None)
        sequence.slot = self._padding_slot
        sequence.block_table = BlockTable(Node(-1, (), None), [self._padding_page + 1], 0, None, [], 0)
        self.begin(sequence)
        return sequence

    def _needs_logits(self, sequence: Sequence) -> bool:
        """Whether the host chooses the next token of a sequence, which still waits for it."""
        return sequence.slot is not None and not self._chosen_on_device(sequence)

    def _chosen_on_device(self, sequence: Sequence) -> bool:
        return self._samples and chosen_on_device(sequence, self._penalise is not None)

    def _needs_no_host(self, sequence: Sequence) -> bool:
        """Whether its token can be chosen on the device, for the most part of the answer at least."""
        return self._samples and needs_no_host(sequence.request.sampling, self._penalise is not None)

    @property
    def _penalise(self) -> Callable[..., None] | None:
        """The operations' way to lower the logits of tokens that a text has; None: the host's sampler does it."""
        return getattr(self.operations, "penalise", None)
