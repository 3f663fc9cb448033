"""Who is computed next: first come, first served, from a bounded queue, as far as slots and KV pages go.

A request waits, then has a slot: its images are encoded, its prompt is prefilled in chunks, and then
it decodes in every batch until it ends. Pure bookkeeping: no tensors, no clock, and not thread-safe by
itself (the engine holds a lock around every call).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from api.engine.encoder_cache import EncoderCache, ImageKey
from api.engine.kv_cache import KvCache
from api.engine.request import ImageInput
from api.engine.sequence import Sequence

# A request that begins like one now being prefilled waits for it, if at least so many tokens can be shared.
WORTH_WAITING_TOKENS = 32
# The rest of a step's token budget is not spent on less than this of a longer prompt.
SMALLEST_CHUNK_TOKENS = 16


class QueueFull(Exception):
    """The waiting queue holds as many requests as it may."""


@dataclass(eq=False)
class EncodeTask:
    """One image on its way through the vision encoder, in as many slices as the engine likes."""

    key: ImageKey
    image: ImageInput
    state: Any = None  # the runner's own


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of one sequence, to be prefilled."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.end == len(self.sequence.keys)


@dataclass(frozen=True)
class Batch:
    """What one forward pass computes: one token for each of `decode`, and these chunks of prompts."""

    decode: tuple[Sequence, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (*self.decode, *(chunk.sequence for chunk in self.chunks))

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Those that get their next token from this batch."""
        return (*self.decode, *(chunk.sequence for chunk in self.chunks if chunk.is_last))

    @property
    def chunk_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    def halves(self, cut_chunks: bool) -> tuple[Batch, ...]:
        """The same work in two batches, or none if it cannot be divided."""
        work: list[Sequence | Chunk] = [*self.decode, *self.chunks]
        if len(work) > 1:
            middle = len(work) // 2
            return _batch_of(work[:middle]), _batch_of(work[middle:])
        if cut_chunks and self.chunk_tokens > 1:
            chunk = self.chunks[0]
            middle = (chunk.start + chunk.end) // 2
            return tuple(
                Batch((), (Chunk(chunk.sequence, *ends),)) for ends in pairwise((chunk.start, middle, chunk.end))
            )
        return ()


def _batch_of(work: list[Sequence | Chunk]) -> Batch:
    return Batch(
        tuple(item for item in work if isinstance(item, Sequence)),
        tuple(item for item in work if isinstance(item, Chunk)),
    )


@dataclass(eq=False)
class Scheduler:
    queue_size: int
    slots: int
    kv: KvCache
    encoder_cache: EncoderCache
    preemptions: int = 0
    _waiting: deque[Sequence] = field(default_factory=deque)
    _running: list[Sequence] = field(default_factory=list)  # in order of admission
    _free_slots: list[int] = field(default_factory=list)
    _job: EncodeTask | None = None

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.slots))
        self._reserved_slot: int | None = self.slots  # for a probe

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def decoding(self) -> int:
        return sum(s.decoding for s in self._running)

    @property
    def has_prompt(self) -> bool:
        """Whether a part of a prompt could be computed now."""
        return any(not s.decoding and s.missing_image() is None for s in self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    # Coming and going.

    def add(self, sequence: Sequence) -> None:
        # A request that can run at once does not count as waiting; a probe has its own place.
        ordinary = sum(not s.request.probe for s in self._waiting)
        if not sequence.request.probe and ordinary >= self.queue_size + len(self._free_slots):
            raise QueueFull(f"{ordinary} requests are waiting")
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence, keep: bool = True) -> None:
        """Take a sequence out, wherever it is; doing so twice is no mistake. `keep`: its KV is good to share."""
        if sequence in self._running:
            self._stop(sequence, keep)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def find(self, request_id: str) -> Sequence | None:
        return next((s for s in self.sequences() if s.request.id == request_id), None)

    def position(self, request_id: str) -> int | None:
        """0 for a running request, 1 for the first in the queue, None for one that is not here."""
        if any(s.request.id == request_id for s in self._running):
            return 0
        for place, sequence in enumerate(self._waiting, start=1):
            if sequence.request.id == request_id:
                return place
        return None

    def ended(self, now: float) -> list[Sequence]:
        """Those that somebody aborted or whose time is up."""
        return [s for s in self.sequences() if s.aborted or s.overdue(now)]

    def sequences(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    # One step: admit, then one image, then one batch.

    def admit(self) -> list[Sequence]:
        """Give slots and pages to those whose turn it is. The copies in their block tables come before all else."""
        started = []
        while (sequence := self._next()) is not None and self._start(sequence):
            started.append(sequence)
        return [s for s in started if s.block_table]  # a probe may have thrown somebody out again

    def next_encode_task(self) -> EncodeTask | None:
        """The image to go on with: the one begun, else the first that somebody needs."""
        if self._job and not any(self._lacks(s, self._job.key) for s in self._running):
            self._job = None  # nobody waits for it any more
        for sequence in self._by_urgency():
            if self._job:
                break
            place = sequence.missing_image()
            if place is not None:
                self._job = EncodeTask(sequence.spans[place].key, sequence.spans[place].image)
        return self._job

    def encode_done(self, job: EncodeTask, features: Any, size_bytes: int) -> None:
        self._job = None
        self.encoder_cache.put(job.key, features, size_bytes)
        for sequence in self._running:
            for place, span in enumerate(sequence.spans):
                if span.key == job.key and span.end > sequence.computed:
                    sequence.features[place] = features

    def encode_failed(self, job: EncodeTask) -> list[Sequence]:
        """Forget the job; returns those who waited for it."""
        self._job = None
        return self.waiting_for(job)

    def waiting_for(self, job: EncodeTask) -> list[Sequence]:
        return [s for s in self._running if self._lacks(s, job.key)]

    def batch(self, chunk_tokens: int) -> Batch:
        """Everyone who decodes, and at most `chunk_tokens` tokens of prompts."""
        self._make_room()
        decode = tuple(s for s in self._running if s.decoding)
        chunks: list[Chunk] = []
        for sequence in self._by_urgency():
            if sequence.decoding or sequence.missing_image() is not None:
                continue
            left = len(sequence.keys) - sequence.computed
            if chunk_tokens <= 0 or (chunks and chunk_tokens < min(left, SMALLEST_CHUNK_TOKENS)):
                break
            chunk = Chunk(sequence, sequence.computed, sequence.computed + min(left, chunk_tokens))
            chunk_tokens -= chunk.end - chunk.start
            chunks.append(chunk)
        return Batch(decode, tuple(chunks))

    def computed(self, batch: Batch) -> None:
        """The batch has been computed: its keys and values are there for everybody with the same beginning."""
        for sequence in batch.decode:
            self._store(sequence, sequence.computed + 1)
        for chunk in batch.chunks:
            self._store(chunk.sequence, chunk.end)

    def check(self) -> None:
        """Raise AssertionError unless slots, pages and images are all accounted for."""
        self.kv.check()
        self.encoder_cache.check()
        taken = [-1 if s.slot is None else s.slot for s in self._running]
        reserved = [] if self._reserved_slot is None else [self._reserved_slot]
        assert sorted([*taken, *self._free_slots, *reserved]) == list(range(self.slots + 1)), "a slot is lost"
        for sequence in self._running:
            assert sequence.block_table is not None and sequence.computed < len(sequence.keys)
        assert all(s.block_table is None and s.slot is None for s in self._waiting), "a waiting request holds something"
        if not self._running:
            assert self.kv.used_tokens == 0, "pages are held by nobody"

    # Slots and pages.

    def _next(self) -> Sequence | None:
        return next((s for s in self._waiting if s.request.probe), self._waiting[0] if self._waiting else None)

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and pages for all it has; False if it must wait."""
        probe = sequence.request.probe
        if not (self._free_slots or (probe and self._reserved_slot is not None)) or self._can_share_soon(sequence):
            return False
        # Leave a page for everyone who decodes, or the next step would throw somebody out again.
        spare = sum(s.decoding for s in self._running)
        block_table = self.kv.allocate(sequence.request.salt, sequence.keys, spare)
        while block_table is None and probe and (victims := self._ordinary()):
            self._preempt(victims[-1])
            block_table = self.kv.allocate(sequence.request.salt, sequence.keys)
        if block_table is None:
            return False
        if probe and self._reserved_slot is not None:
            sequence.slot, self._reserved_slot = self._reserved_slot, None
        else:
            sequence.slot = heapq.heappop(self._free_slots)
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.block_table, sequence.computed = block_table, block_table.cached_tokens
        if not sequence.output_ids:
            sequence.cached_tokens = block_table.cached_tokens
        for place, span in enumerate(sequence.spans):
            if span.end > sequence.computed and (features := self.encoder_cache.get(span.key)) is not None:
                sequence.features[place] = features
        return True

    def _stop(self, sequence: Sequence, keep: bool) -> None:
        assert sequence.block_table is not None and sequence.slot is not None
        self._running.remove(sequence)
        self.kv.free(sequence.block_table, sequence.keys, keep)
        if sequence.slot == self.slots:
            self._reserved_slot = sequence.slot
        else:
            heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = sequence.block_table = None
        sequence.computed = 0
        sequence.features.clear()

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; what it has said so far will be prefilled like a prompt."""
        self._stop(sequence, keep=True)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _make_room(self) -> None:
        """A page for the next token of everyone who decodes; the youngest gives way if there is none."""
        for sequence in list(self._running):
            while sequence.block_table and sequence.decoding and not self.kv.append(sequence.block_table, len(sequence.keys)):
                self._preempt((self._ordinary() or self._running)[-1])

    def _store(self, sequence: Sequence, tokens: int) -> None:
        assert sequence.block_table is not None
        sequence.computed = tokens
        self.kv.store(sequence.block_table, sequence.keys, tokens)
        for place in [p for p in sequence.features if sequence.spans[p].end <= tokens]:
            del sequence.features[place]

    # Order.

    def _by_urgency(self) -> Iterator[Sequence]:
        yield from (s for s in self._running if s.request.probe)
        yield from (s for s in self._running if not s.request.probe)

    def _ordinary(self) -> list[Sequence]:
        """Those who may have to give way; probes must not throw each other out for ever."""
        return [s for s in self._running if not s.request.probe]

    def _can_share_soon(self, sequence: Sequence) -> bool:
        """Whether somebody is just computing what this one needs too."""
        return any(
            not other.decoding
            and other.request.salt == sequence.request.salt
            and _common(other, sequence) - other.computed >= WORTH_WAITING_TOKENS
            for other in self._running
        )

    @staticmethod
    def _lacks(sequence: Sequence, key: ImageKey) -> bool:
        return any(
            span.key == key and span.end > sequence.computed and place not in sequence.features
            for place, span in enumerate(sequence.spans)
        )


def _common(one: Sequence, other: Sequence) -> int:
    """Tokens that two sequences begin with alike."""
    length = 0
    for a, b in zip(one.keys, other.keys, strict=False):
        if a != b:
            break
        length += 1
    return length
