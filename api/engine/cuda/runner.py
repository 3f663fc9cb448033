"""The runner of a CUDA device: one copy to the device and one wait a step, decode steps as recorded graphs.

What a step needs of its rows travels in one block (staging.py); block tables, the token sampled last in each slot and all
buffers stay on the device (tables.py). Tokens are sampled there, unless a row's choice needs the host (sampling.py).
Engine thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from api.engine.cuda.device import Device, Event
from api.engine.cuda.graphs import DecodeGraphs, buckets_for
from api.engine.cuda.sampling import choose_tokens, chosen_on_device, needs_no_host
from api.engine.cuda.staging import FLOAT_FIELDS, TABLE_CHANGES, TOKEN_FIELDS, Staging
from api.engine.cuda.tables import DeviceTables
from api.engine.kv_cache import BlockTable, Node
from api.engine.loaded_model import Capacity, SampledToken
from api.engine.model.operations import AttentionMetadata, ForwardBatch, Operations
from api.engine.model.runner import Glm4vRunner
from api.engine.model.sampler import NOT_FINITE
from api.engine.model.weight_source import WeightSource
from api.engine.request import Request, SamplingParams
from api.engine.scheduler import Batch, Chunk
from api.engine.sequence import Sequence

logger = logging.getLogger(__name__)

RESULTS = 3  # blocks of results that may be on their way


@dataclass
class Flight:
    """A step that the device computes, or has computed: the `Flight` of api.engine.loaded_model."""

    sequences: tuple[Sequence, ...]  # whose next tokens it samples
    result: torch.Tensor  # int32 [rows], on the host once `finished` is reached
    began: Event
    finished: Event
    logits: torch.Tensor  # float32 [rows, vocabulary], until the next step is queued
    recorded: bool  # whether it was a graph

    @property
    def seconds(self) -> float:
        return self.finished.seconds_since(self.began)


class CudaRunner(Glm4vRunner):
    """`device` is what streams, events, pinned memory and graphs go through."""

    overlaps = True
    SPARE_PAGES = 2  # one that stays zero and one that padding rows write to
    SPARE_SLOTS = 2  # one for a probe and one for padding rows

    def __init__(
        self, source: WeightSource, capacity: Capacity, context_tokens: int, operations: Operations, device: Device
    ) -> None:
        self._graphs: DecodeGraphs | None = None
        self._rows = capacity.slots + 1  # sequences at once, with that of a probe
        self._queue = device
        super().__init__(source, capacity, context_tokens, operations)
        place = self._device
        self._padding_slot = self._rows
        self._staging = Staging(device, place, self._rows, capacity.chunk_tokens + self._rows)
        width = -(-context_tokens // capacity.page_tokens) + 1
        self._tables = DeviceTables(self._rows + 1, width, self._padding_page, place)
        self._tables.tables[self._padding_slot].fill_(self._padding_page + 1)
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
        self._graphs = DecodeGraphs(self._queue, self._decode_step_of, buckets_for(self._rows))
        prepare = getattr(self.operations, "prepare", None)
        if prepare is not None:
            prepare(self._rows, self._decoder.heads, self._decoder.head_dim, self._decoder.device)

    def release_weights(self) -> None:
        self._graphs = None
        super().release_weights()

    @property
    def graphs(self) -> DecodeGraphs:
        assert self._graphs is not None
        return self._graphs

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        slot, sampling = sequence.slot, sequence.request.sampling
        on_device = needs_no_host(sampling)
        self._parameters["temperature"][slot] = sampling.temperature if on_device else 0.0
        self._parameters["top_p"][slot] = sampling.top_p
        self._parameters["min_p"][slot] = sampling.min_p
        self._parameters["top_k"][slot] = max(sampling.top_k, 1) if on_device else 1

    def compute(self, batch: Batch) -> list[SampledToken]:
        tokens = sum(chunk.end - chunk.start for chunk in batch.chunks)
        if self.observer is not None or tokens + len(batch.decode) > self._staging.tokens:
            return super().compute(batch)
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch) -> Flight:
        return self._launch(batch, 0)

    def launch_next(self, flight: Flight, sequences: tuple[Sequence, ...]) -> Flight | None:
        if not flight.recorded or not all(map(chosen_on_device, flight.sequences)):
            return None
        return self._launch(Batch(sequences), 1)

    @torch.inference_mode()
    def _launch(self, batch: Batch, ahead: int) -> Flight:
        """Queue a step. `ahead`: how many tokens of its sequences are not known yet; the device takes the last itself."""
        sampled = batch.sampled
        began = self._queue.record()
        self._stage_rows(batch.decode, sampled, ahead)
        bucket = None if batch.chunks else self.graphs.bucket_for(len(sampled))
        if bucket is None:
            self._run_operations(batch)
        else:
            self._pad(len(sampled), bucket)
            self._send(batch, 0)
            self.graphs.replay(bucket)
        self._flights = (self._flights + 1) % RESULTS
        result = self._results[self._flights][: len(sampled)]
        if sampled:
            self._queue.download(result, self._sampled[: len(sampled)])
        logits = self._logits[: len(sampled)]
        return Flight(sampled, result, began, self._queue.record(), logits, bucket is not None)

    @torch.inference_mode()
    def collect(self, flight: Flight) -> list[SampledToken]:
        """Wait for a step; returns its tokens. Raises GrammarViolation."""
        flight.finished.wait()
        tokens = flight.result.tolist()
        sampled = [
            SampledToken(0, finite=False) if token == NOT_FINITE else SampledToken(token) for token in tokens
        ]
        # Known only now: the token before may have brought a grammar into force, or forced the next one.
        rows = [row for row, sequence in enumerate(flight.sequences) if _needs_logits(sequence)]
        if rows:
            logits = flight.logits if len(rows) == len(tokens) else flight.logits[rows]
            theirs = self._sampler.sample(logits, [flight.sequences[row] for row in rows])
            for row, token in zip(rows, theirs, strict=True):
                sampled[row] = token
        return sampled

    def settle(self, flight: Flight) -> None:
        flight.finished.wait()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs every kind of step over the spare page, and records the largest bucket."""
        super().warm_up()
        sequence = self._warm_up_sequence()
        for start, end in ((0, 4), (4, 6), (6, 7)):
            self.collect(self.launch(Batch((), (Chunk(sequence, start, end),))))
        sequence.append(0)
        sequence.computed = 7
        self.collect(self.launch(Batch((sequence,))))
        self.prepare_next()

    @torch.inference_mode()
    def prepare_next(self) -> bool:
        """Record one more decode step; False if none is left."""
        self._staging.next_block()
        self._pad(0, self._rows)
        self._staging.upload(0, 0)
        try:
            return self.graphs.capture_next()
        except Exception as error:
            if self.failure(error) == "device":
                raise
            self.graphs.switch_off(f"{type(error).__name__}: {error}")
            return False

    # What the host tells the device.

    def _stage_rows(self, decode: Items[Sequence], sampled: Items[Sequence], ahead: int) -> None:
        self._staging.next_block()
        host, slots = self._staging.host, np.array([sequence.slot for sequence in sampled], dtype=np.int64)
        host["given"][: len(decode)] = -1 if ahead else [sequence.output_ids[-1] for sequence in decode]
        host["length"][: len(decode)] = [sequence.computed + ahead + 1 for sequence in decode]
        host["position"][: len(decode)] = [sequence.computed + ahead + sequence.state.delta for sequence in decode]
        host["slot"][: len(slots)] = slots
        for name, values in self._parameters.items():
            host[name][: len(slots)] = values[slots]
        numbers = [len(sequence.output_ids) + ahead + 1 for sequence in sampled]
        host["random"][: len(slots)] = self._sampler.random_numbers(slots, numbers)

    def _pad(self, rows: int, bucket: int) -> None:
        """Rows that write to the spare page and are read by nobody."""
        host, padding = self._staging.host, slice(rows, bucket)
        host["slot"][padding] = self._padding_slot
        host["length"][padding] = 1
        host["temperature"][padding] = 0
        host["top_k"][padding] = 1
        for name in ("given", "position", "top_p", "min_p"):
            host[name][padding] = 0

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

    def _decode_step_of(self, rows: int) -> None:
        """A decode step of `rows` rows from the buffers: what a graph records."""
        staged = {name: field[:rows] for name, field in self._staging.device.items()}
        slots, lengths = staged["slot"], staged["length"]
        last = self._last_tokens.index_select(0, slots)
        tokens = torch.where(staged["given"] >= 0, staged["given"], last)
        tables = self._tables.tables.index_select(0, slots)
        at = (lengths - 1).long()
        pages = tables.gather(1, (at // self._page_tokens)[:, None])[:, 0]
        kv_slots = pages.long() * self._page_tokens + at % self._page_tokens
        batch = ForwardBatch(
            self._decoder.embeddings.index_select(0, tokens), *self._decoder.rotary.tables, kv_slots,
            (AttentionMetadata(0, rows, tables, None, lengths),), None, staged["position"],
        )  # fmt: skip
        self._logits[:rows].copy_(self._decoder.head(self._decoder.hidden(batch)))
        self._choose(rows)

    def _run_operations(self, batch: Batch) -> None:
        """A step with prompts, operation by operation."""
        decode, chunks, rows = len(batch.decode), batch.chunks, len(batch.sampled)
        tokens = self._stage_tokens(batch)
        self._send(batch, tokens)
        staged = self._staging.device
        ids, slots = staged["ids"][:tokens], staged["slot"]
        inputs = self._decoder.embeddings.index_select(0, ids)
        attention = []
        if decode:
            longest = max(sequence.computed + 1 for sequence in batch.decode)
            tables = self._tables.tables.index_select(0, slots[:decode])[:, : self._pages_for(longest, 1)]
            attention.append(AttentionMetadata(0, decode, tables, None, staged["length"][:decode]))
        row = decode
        for chunk in chunks:
            self._insert_image_features(inputs, row, chunk)
            end = row + chunk.end - chunk.start
            table = self._tables.tables[chunk.sequence.slot, : self._pages_for(chunk.end, 1)]
            attention.append(AttentionMetadata(row, end, table, first=chunk.start))
            row = end
        positions = torch.stack([staged[axis][:tokens] for axis in ("time", "height", "width")]).long()
        cos, sin = self._decoder.rotary.at(positions)
        indices = None if rows == tokens else staged["sampled_rows"][:rows]
        forward = ForwardBatch(inputs, cos, sin, staged["kv_slots"][:tokens].long(), tuple(attention), indices)
        normed = self._decoder.hidden(forward)
        if rows:
            self._logits[:rows].copy_(self._decoder.head(normed))
            self._choose(rows)

    def _stage_tokens(self, batch: Batch) -> int:
        """Facts of each input token, those of decoding sequences first; returns their number."""
        host, count = self._staging.host, len(batch.decode)
        for name in ("time", "height", "width"):
            host[name][:count] = host["position"][:count]
        host["ids"][:count] = host["given"][:count]
        host["kv_slots"][:count] = [self._slot_of(s, s.computed) for s in batch.decode]
        host["sampled_rows"][:count] = np.arange(count)
        row, sampled = count, count
        for chunk in batch.chunks:
            sequence, end = chunk.sequence, row + chunk.end - chunk.start
            host["ids"][row:end] = sequence.token_ids[chunk.start : chunk.end]
            for name, positions in zip(TOKEN_FIELDS[2:], sequence.state.prompt, strict=True):
                host[name][row:end] = positions[chunk.start : chunk.end]
            host["kv_slots"][row:end] = self._slot_mapping(sequence, chunk.start, chunk.end)
            row = end
            if chunk.is_last:
                host["sampled_rows"][sampled] = row - 1
                sampled += 1
        return row

    def _slot_of(self, sequence: Sequence, at: int) -> int:
        """Row of the KV cache that a token is written to."""
        assert sequence.block_table is not None
        return sequence.block_table.pages[at // self._page_tokens] * self._page_tokens + at % self._page_tokens

    def _choose(self, rows: int) -> None:
        """Sample the next token of each row, and keep it for the next step of its slot."""
        staged = {name: field[:rows] for name, field in self._staging.device.items()}
        sampled = choose_tokens(
            self._logits[:rows], staged["temperature"], staged["top_k"], staged["top_p"], staged["min_p"],
            staged["random"],
        )  # fmt: skip
        self._sampled[:rows].copy_(sampled)
        self._last_tokens.index_copy_(0, staged["slot"].long(), sampled.clamp(min=0))

    def _warm_up_sequence(self) -> Sequence:
        """A prompt of seven tokens in the spare page."""
        request = Request("warm-up", (0,) * 7, SamplingParams(max_tokens=1))
        sequence = Sequence(request, lambda event: None)
        sequence.slot = self._padding_slot
        sequence.block_table = BlockTable(Node(-1, (), None), [self._padding_page + 1], 0, None, [], 0)
        self.begin(sequence)
        return sequence


def _needs_logits(sequence: Sequence) -> bool:
    """Whether the host chooses the next token of a sequence, which still waits for it."""
    return sequence.slot is not None and not chosen_on_device(sequence)
