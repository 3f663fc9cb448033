"""Every forward pass of a GLM-4.6V model: from sequences to tensors, and from logits to tokens.

Knows sequences and pages, not the queue. Engine thread only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from api.engine.kv_cache import BlockTable, Copy, Node
from api.engine.loaded_model import Capacity, SampledToken
from api.engine.model.decoder import Decoder, Observer
from api.engine.model.operations import AttentionMetadata, ForwardBatch, Operations
from api.engine.model.rotary import rope_positions
from api.engine.model.sampler import Sampler
from api.engine.model.vision_encoder import VisionEncoder
from api.engine.model.weight_source import WeightSource
from api.engine.scheduler import Batch, Chunk, EncodeTask
from api.engine.sequence import Sequence
from api.engine.token_budget import FREE_ROWS

# Attention over the KV cache is padded to multiples of this many tokens, so that few shapes occur. Decoding on the CPU
# pads to pages only: its kernel does not depend on shapes, and padding costs memory bandwidth.
LENGTH_STEP = 64


@dataclass(frozen=True)
class _Positions:
    """M-RoPE positions of one sequence."""

    prompt: np.ndarray  # [3, tokens]
    delta: int  # position minus index of later tokens

    def between(self, start: int, end: int) -> np.ndarray:
        """[3, end - start]; tokens after the prompt may be among them."""
        known = self.prompt[:, start:end]
        later = np.arange(max(start, self.prompt.shape[1]), end) + self.delta
        return np.concatenate([known, np.broadcast_to(later, (3, len(later)))], axis=1) if len(later) else known


@dataclass(frozen=True)
class _DecodeOrder:
    """Decoding sequences as rows of a forward batch: longest first, those of similar length in one group."""

    order: tuple[int, ...]
    ends: tuple[int, ...]  # row after each group


class Glm4vRunner:
    """The `Runner` of api.engine.loaded_model."""

    overlaps = False
    free_rows = FREE_ROWS
    # Pages beyond those that are allocated: one stays zero and pads what is read, so that no row reads another's.
    SPARE_PAGES = 1
    SPARE_SLOTS = 1  # beyond those of requests: one for a probe

    def __init__(self, source: WeightSource, capacity: Capacity, context_tokens: int, operations: Operations) -> None:
        self.operations = operations
        self.observer: Observer | None = None  # of the layers of the next batches; for fault injection
        self._context_tokens = context_tokens
        self._pages = capacity.pages
        self._kv: list[torch.Tensor] | None = None
        self._page_tokens = capacity.page_tokens
        self.take_weights(source)
        self._padding_page = capacity.pages
        self._device = self._decoder.device
        self._decode_step = capacity.page_tokens if self._device.type == "cpu" else LENGTH_STEP
        self._sampler = Sampler(capacity.slots + self.SPARE_SLOTS, self._decoder.vocabulary_size, self._device)

    @torch.inference_mode()
    def take_weights(self, source: WeightSource) -> None:
        """Compute with the weights of `source` from now on; the KV cache stays."""
        pages = self._pages + self.SPARE_PAGES
        decoder = Decoder(source, self._context_tokens, pages, self._page_tokens, self.operations, self._kv)
        vision_encoder = VisionEncoder(source, self.operations)
        self._decoder, self._vision_encoder = decoder, vision_encoder  # only once all of it could be read
        self._kv = self._decoder.kv

    def release_weights(self) -> None:
        """Free the memory of the weights. Nothing can be computed until `take_weights`."""
        del self._decoder, self._vision_encoder

    def drop_tables(self) -> None:
        """Forget what is kept of earlier images besides their features."""
        self._vision_encoder.drop_tables()

    @property
    def decoder(self) -> Decoder:
        return self._decoder

    @property
    def vision_encoder(self) -> VisionEncoder:
        return self._vision_encoder

    @torch.inference_mode()
    def answer_alone(self, sequence: Sequence, observe: Observer | None = None) -> torch.Tensor:
        """Logits [vocabulary] after the prompt of a sequence that no scheduler knows. Uses no cache and changes none."""
        for number, span in enumerate(sequence.spans):
            progress = self._vision_encoder.begin(span.image.patches, span.image.grid, keep_table=False)
            sequence.features[number] = self._vision_encoder.advance(progress, limit_s=float("inf"))
        positions, delta = rope_positions(len(sequence.keys), sequence.spans, self._vision_encoder.merge)
        sequence.state = _Positions(positions, delta)
        # Whole steps of pages, so that nothing is padded with a page of the real cache.
        pages = self._pages_for(len(sequence.keys), LENGTH_STEP)
        sequence.block_table = BlockTable(Node(-1, (), None), [*range(pages)], 0, None, [], 0)
        batch = self._forward_batch([], (), [Chunk(sequence, 0, len(sequence.keys))])
        return self._decoder.run(batch, observe, self._decoder.new_kv(pages * self._page_tokens))[0]

    @torch.inference_mode()
    def encode(self, task: EncodeTask, limit_s: float) -> torch.Tensor | None:
        if task.state is None:
            task.state = self._vision_encoder.begin(task.image.patches, task.image.grid)
        return self._vision_encoder.advance(task.state, limit_s)

    def size_bytes(self, features: torch.Tensor) -> int:
        return features.nbytes

    @torch.inference_mode()
    def copy_pages(self, copies: Items[Copy]) -> None:
        for copy in copies:
            source, target = copy.source * self._page_tokens, copy.target * self._page_tokens
            for kv in self._decoder.kv:
                kv[target : target + copy.tokens] = kv[source : source + copy.tokens].clone()

    @torch.inference_mode()
    def clear_pages(self, pages: Items[int]) -> None:
        for page in pages:
            for kv in self._decoder.kv:
                kv[page * self._page_tokens : (page + 1) * self._page_tokens].zero_()

    def begin(self, sequence: Sequence) -> None:
        positions, delta = rope_positions(len(sequence.keys), sequence.spans, self._vision_encoder.merge)
        sequence.state = _Positions(positions, delta)
        self._sampler.begin(sequence)

    @torch.inference_mode()
    def compute(self, batch: Batch) -> list[SampledToken]:
        rows = _decode_order([sequence.computed + 1 for sequence in batch.decode])
        decode = [batch.decode[number] for number in rows.order]
        logits = self._decoder.run(self._forward_batch(decode, rows.ends, batch.chunks), self.observer)
        tokens = self._sampler.sample(logits, [*decode, *(c.sequence for c in batch.chunks if c.is_last)])
        row_of = {number: row for row, number in enumerate(rows.order)}
        return [tokens[row_of[number]] for number in range(len(decode))] + tokens[len(decode) :]

    def prepare_next(self) -> bool:
        return False

    def close(self) -> None:
        """The memory of the host is given back with the process."""

    def failure(self, error: BaseException) -> Literal["request", "memory", "device"]:
        """After a CUDA error every later call fails too, except after running out of memory."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return "memory"
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "memory"
        return "device" if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error) else "request"

    @torch.inference_mode()
    def warm_up(self) -> None:
        side = 2 * self._vision_encoder.merge
        progress = self._vision_encoder.begin(
            torch.zeros(side * side, self._vision_encoder.patch_size), (1, side, side)
        )
        self._vision_encoder.advance(progress, limit_s=float("inf"))
        for start, end in ((0, 4), (4, 6), (6, 7)):
            self._decoder.run(self._warm_up_batch(start, end))

    @torch.inference_mode()
    def rehearse(self, image_tokens: int, chunk_tokens: int, rows: int) -> None:
        """Compute what takes most memory, so that it can be measured: an image, a chunk of a prompt between two slices of
        it, and the logits of `rows` sequences. Only page 0 is written, before anything is stored in it."""
        encoder, embeddings = self._vision_encoder, self._decoder.embeddings
        high = next(side for side in range(math.isqrt(image_tokens), 0, -1) if image_tokens % side == 0)
        grid = (1, high * encoder.merge, image_tokens // high * encoder.merge)
        patches = torch.zeros(grid[1] * grid[2], encoder.patch_size)
        progress = encoder.begin(patches, grid)
        encoder.advance(progress, limit_s=float("inf"))
        for count, decode in ((chunk_tokens, False), (rows, True)):
            slots = self._tensor(np.arange(count) % self._page_tokens)
            cos, sin = self._decoder.spread_over_heads(*self._decoder.rotary.at_text(slots))
            pages = self._tensor(np.zeros(self._pages_for(1 if decode else count, LENGTH_STEP)))
            metadata = AttentionMetadata(0, count, pages)
            if decode:
                mask = self._mask(np.zeros((count, len(pages) * self._page_tokens), dtype=bool))[:, None, None]
                table = pages.repeat(count, 1)
                metadata = AttentionMetadata(0, count, table, mask, self._tensor(np.ones(count)))
            inputs = embeddings.index_select(0, self._tensor(np.zeros(count)))
            indices = None if decode else self._tensor([count - 1])
            self._decoder.run(ForwardBatch(inputs, cos, sin, slots, (metadata,), indices))
        encoder.drop_tables()

    def resize_kv(self, pages: int) -> None:
        """Give the KV cache this many pages. What it held is lost, so no sequence may have begun."""
        self._pages = self._padding_page = pages
        self._kv = None
        self._decoder.kv = []  # freed before the new one is allocated
        self._kv = self._decoder.kv = self._decoder.new_kv((pages + self.SPARE_PAGES) * self._page_tokens)

    # From sequences to tensors.

    def _forward_batch(self, decode: list[Sequence], ends: tuple[int, ...], chunks: Items[Chunk]) -> ForwardBatch:
        ids: list[Items[int]] = []
        positions, slots = [], []
        for sequence in decode:
            at = sequence.computed
            ids.append([sequence.output_ids[-1]])
            positions.append(np.full((3, 1), at + sequence.state.delta))
            slots.append(self._slot_mapping(sequence, at, at + 1))
        for chunk in chunks:
            sequence = chunk.sequence
            ids.append(sequence.token_ids[chunk.start : chunk.end])
            positions.append(sequence.state.between(chunk.start, chunk.end))
            slots.append(self._slot_mapping(sequence, chunk.start, chunk.end))
        inputs = self._decoder.embeddings.index_select(0, self._tensor(np.concatenate(ids)))
        attention, logits_indices = [], list(range(len(decode)))
        for start, end in zip((0, *ends), ends, strict=False):
            attention.append(self._decode_metadata(decode[start:end], start))
        row = len(decode)
        for chunk in chunks:
            self._insert_image_features(inputs, row, chunk)
            attention.append(self._prefill_metadata(chunk, row))
            row = attention[-1].end
            if chunk.is_last:
                logits_indices.append(row - 1)
        cos, sin = self._decoder.spread_over_heads(*self._cos_sin(positions, chunks))
        all_rows = len(logits_indices) == len(inputs)
        return ForwardBatch(
            inputs, cos, sin, self._tensor(np.concatenate(slots)), tuple(attention),
            None if all_rows else self._tensor(logits_indices),
        )  # fmt: skip

    def _cos_sin(self, positions: list[np.ndarray], chunks: Items[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        at, rotary = np.concatenate(positions, axis=1), self._decoder.rotary
        if any(chunk.sequence.spans for chunk in chunks):
            return rotary.at(self._tensor(at))
        return rotary.at_text(self._tensor(at[0]))

    def _slot_mapping(self, sequence: Sequence, start: int, end: int) -> np.ndarray:
        """Rows of the KV cache that tokens `start` to `end` are written to."""
        assert sequence.block_table is not None
        index = np.arange(start, end)
        pages = np.asarray(sequence.block_table.pages)
        return pages[index // self._page_tokens] * self._page_tokens + index % self._page_tokens

    def _decode_metadata(self, sequences: list[Sequence], start: int) -> AttentionMetadata:
        lengths = [sequence.computed + 1 for sequence in sequences]
        pages = self._pages_for(max(lengths), self._decode_step)
        tables = np.full((len(sequences), pages), self._padding_page)
        for row, sequence in enumerate(sequences):
            assert sequence.block_table is not None
            held = sequence.block_table.pages[:pages]
            tables[row, : len(held)] = held
        mask = None
        if self._decoder.needs_masks:
            beyond = np.arange(pages * self._page_tokens) >= np.array(lengths)[:, None]
            mask = self._mask(beyond)[:, None, None]
        return AttentionMetadata(start, start + len(sequences), self._tensor(tables), mask, self._tensor(lengths))

    def _prefill_metadata(self, chunk: Chunk, row: int) -> AttentionMetadata:
        assert chunk.sequence.block_table is not None
        pages = self._pages_for(chunk.end, LENGTH_STEP)
        held = chunk.sequence.block_table.pages[:pages]
        table = np.full(pages, self._padding_page)
        table[: len(held)] = held
        mask = None
        if chunk.start and self._decoder.needs_masks:
            mask = self._mask(np.arange(pages * self._page_tokens) > np.arange(chunk.start, chunk.end)[:, None])
        return AttentionMetadata(row, row + chunk.end - chunk.start, self._tensor(table), mask, first=chunk.start)

    def _pages_for(self, tokens: int, multiple: int) -> int:
        step = max(multiple // self._page_tokens, 1)
        return -(-tokens // (self._page_tokens * step)) * step

    def _mask(self, masked: np.ndarray) -> torch.Tensor:
        """Additive mask for scores: minus infinity where `masked` is true."""
        mask = torch.zeros(masked.shape, dtype=self._decoder.dtype, device=self._device)
        return mask.masked_fill_(torch.from_numpy(masked).to(self._device), -torch.inf)

    def _insert_image_features(self, inputs: torch.Tensor, row: int, chunk: Chunk) -> None:
        """Replace the embeddings of image tokens with the features of their images."""
        for number, span in enumerate(chunk.sequence.spans):
            start, end = max(span.start, chunk.start), min(span.end, chunk.end)
            if start < end:
                features = chunk.sequence.features[number][start - span.start : end - span.start]
                inputs[row + start - chunk.start : row + end - chunk.start] = features

    def _warm_up_batch(self, start: int, end: int) -> ForwardBatch:
        """A batch over page 0 without a sequence; the keys and values that it writes there are never read."""
        slots = self._tensor(np.arange(start, end) % self._page_tokens)
        cos, sin = self._decoder.spread_over_heads(*self._decoder.rotary.at_text(slots))
        inputs = self._decoder.embeddings[start:end]
        pages = self._tensor(np.zeros(self._pages_for(1, LENGTH_STEP), dtype=np.int64))
        mask = self._mask(np.zeros((end - start, len(pages) * self._page_tokens), dtype=bool))
        if start == 0:
            metadata = AttentionMetadata(0, end, pages)
        elif end - start > 1:
            metadata = AttentionMetadata(0, end - start, pages, mask, first=start)
        else:
            metadata = AttentionMetadata(0, 1, pages[None], mask[:, None, None], self._tensor([1]))
        return ForwardBatch(inputs, cos, sin, slots, (metadata,), None)

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(self._device)


def _decode_order(lengths: Items[int]) -> _DecodeOrder:
    """Group rows of similar length, so that a short one is not padded to a long one."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    ends, longest = [], 0
    for row, number in enumerate(order):
        if row == 0 or 2 * lengths[number] + LENGTH_STEP < longest:
            if row:
                ends.append(row)
            longest = lengths[number]
    return _DecodeOrder(tuple(order), (*ends, len(order)) if order else ())
