"""The scheduler: first come, first served, from a bounded queue, as far as slots and KV pages allow.

A sequence waits until it gets a slot; then its images are encoded, its prompt is prefilled in chunks, and it decodes
in every batch until it ends. Bookkeeping only: no tensors, no clock. Not thread-safe: the engine's lock guards the queue,
slots and pages.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

from api.engine.encoder_cache import EncoderCache, ImageKey
from api.engine.kv_cache import KvCache, common_prefix
from api.engine.request import ImageInput
from api.engine.sequence import ImageSpan, Sequence

# A sequence waits for another with the same prefix to be prefilled, if at least this many tokens can be shared.
MIN_SHARED_TOKENS = 32
# A longer prompt does not get less than this from the rest of a step's token budget.
MIN_SPLIT_TOKENS = 16
# So many tokens that a grammar forces are computed at once; more are treated like a prompt.
MAX_FORCED_TOKENS = 32
# Patches are made again while fewer images than this wait with theirs to be encoded.
READ_AHEAD = 2


class QueueFull(Exception):
    """The queue has reached its limit."""


@dataclass(frozen=True)
class Packing:
    """Which images a runner encodes together."""

    patches: int = 0  # of all of them; a larger image is encoded alone
    alike: bool = False  # only images of one size


@dataclass(eq=False)
class EncodeTask:
    """Images to be encoded together, in one or more slices."""

    images: dict[ImageKey, ImageInput]
    state: Any = None  # owned by the runner
    spent_s: float = 0.0  # in the slices so far
    slice_s: float = 0.0  # what the last slice will take a device that computes while the host goes on

    @property
    def patches(self) -> int:
        return sum(prod(image.grid) for image in self.images.values())


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of one sequence, prefilled in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether it ends the prompt, so that the next token is sampled."""
        return self.end == len(self.sequence.keys)


@dataclass(frozen=True)
class Batch:
    """The work of one forward pass: one token of each sequence in `decode`, and chunks of prompts."""

    decode: tuple[Sequence, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (*self.decode, *(chunk.sequence for chunk in self.chunks))

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences whose next token is sampled, in the order of the runner's result."""
        return (*self.decode, *(chunk.sequence for chunk in self.chunks if chunk.is_last))

    @property
    def chunk_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    def halves(self, cut_chunks: bool) -> tuple[Batch, ...]:
        """The same work in two batches; empty if it cannot be divided."""
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


LEAST_QUEUE, QUEUE_PER_SLOT = 32, 2


def queue_for(slots: int) -> int:
    """Requests that may wait where nothing is set: each waits for about as long as two that run."""
    return max(LEAST_QUEUE, QUEUE_PER_SLOT * slots)


@dataclass(eq=False)
class Scheduler:
    queue_size: int
    slots: int
    kv: KvCache
    encoder_cache: EncoderCache
    packing: Packing = Packing()
    preemptions: int = 0
    _waiting: deque[Sequence] = field(default_factory=deque)
    _running: list[Sequence] = field(default_factory=list)  # in order of admission
    _free_slots: list[int] = field(default_factory=list)
    _encode_task: EncodeTask | None = None
    _bytes_per_token: float = 0.0  # of features; the same for all images
    _alone: set[ImageKey] = field(default_factory=set)  # images that failed together with others
    _short_of_room: bool = False  # the next image waits for features that others hold

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
        """Whether a chunk of a prompt could be computed now."""
        return any(not s.decoding and s.missing_image() is None for s in self._running)

    @property
    def has_slot(self) -> bool:
        """Whether the next in the queue can have a slot."""
        return any(self._has_slot_for(sequence) for sequence in self._in_line()[:1])

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    # Queue.

    def add(self, sequence: Sequence) -> None:
        """Append to the queue. Raises QueueFull."""
        # Requests that can start at once do not count as waiting, nor do probes, which have a reserved slot.
        ordinary = sum(not s.request.probe for s in self._waiting)
        if not sequence.request.probe and ordinary >= self.queue_size + len(self._free_slots):
            raise QueueFull(f"{ordinary} requests are waiting")
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence, keep: bool = True) -> None:
        """Remove a waiting or running sequence; doing so twice is harmless. `keep`: its keys and values are valid."""
        if sequence in self._running:
            self._stop(sequence, keep)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def distrust(self, sequence: Sequence) -> None:
        """What a running sequence has computed may be wrong: share none of it with others, its images included."""
        if sequence.block_table is not None:
            self.kv.distrust(sequence.block_table)
        for span in sequence.spans:
            self.encoder_cache.remove(span.key)

    def drop_caches(self) -> None:
        """Forget all keys and values and images but those that running sequences use."""
        self.kv.drop()
        self.encoder_cache.drop()
        self._encode_task = None  # an image that is half encoded starts again
        self._alone.clear()

    def find(self, request_id: str) -> Sequence | None:
        return next((s for s in self.sequences() if s.request.id == request_id), None)

    def position(self, request_id: str) -> int | None:
        """0 for a running request, 1 for the first in the queue, None for an unknown one."""
        if any(s.request.id == request_id for s in self._running):
            return 0
        ids = [s.request.id for s in self._waiting]
        return ids.index(request_id) + 1 if request_id in ids else None

    def ended(self, now: float) -> list[Sequence]:
        """Sequences that are aborted or past their deadline."""
        return [s for s in self.sequences() if s.aborted or s.overdue(now)]

    def running_sequences(self) -> list[Sequence]:
        return list(self._running)

    def sequences(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    # One step: admit, then one image, then one batch.

    def admit(self) -> list[Sequence]:
        """Give slots and pages to waiting sequences. The copies in their block tables must be made before the batch."""
        started = []
        postponed = 0  # each keeps a slot, so that those behind do not delay it
        for sequence in self._in_line():
            if not self._has_slot_for(sequence, postponed):
                break
            if self._can_share_soon(sequence):
                postponed += 1
            elif self._start(sequence):
                started.append(sequence)
            else:
                break
        return [s for s in started if s.block_table]  # a probe may have preempted one of them

    def next_encode_task(self) -> EncodeTask | None:
        """The image to encode next: the one in progress, else the first that a running sequence needs."""
        if self._encode_task and not self.waiting_for(self._encode_task):
            self._encode_task = None
        if self._encode_task is None:
            images = self._images_to_encode()
            self._encode_task = EncodeTask(images) if images else None
        return self._encode_task

    def _images_to_encode(self) -> dict[ImageKey, ImageInput]:
        """The first image whose features are missing, and those after it that can be encoded with it."""
        self._short_of_room = False
        images: dict[ImageKey, ImageInput] = {}
        held = self._held()
        patches = tokens = 0
        for span in self._missing_images():
            image, size = span.image, prod(span.image.grid)
            if image.patches is None or span.key in images:
                continue
            if images and not self._packs_with(span, patches + size, images):
                continue
            if not self.encoder_cache.make_room(round(self._bytes_per_token * (tokens + image.tokens)), held):
                # Over the budget by one image, if nothing that is held can be used before.
                self._short_of_room = not images and any(s.features and self._end(s) > s.computed for s in self._running)
                if images or self._short_of_room:
                    break
            images[span.key] = image
            patches, tokens = patches + size, tokens + image.tokens
            if span.key in self._alone or patches >= self.packing.patches:
                break
        return images

    def _packs_with(self, span: ImageSpan, patches: int, images: dict[ImageKey, ImageInput]) -> bool:
        first = next(iter(images.values()))
        same_size = prod(span.image.grid[1:]) == prod(first.grid[1:])
        return patches <= self.packing.patches and span.key not in self._alone and (same_size or not self.packing.alike)

    def _held(self) -> dict[ImageKey, int]:
        """Bytes of the features that running sequences hold."""
        spans = (sequence.spans[index] for sequence in self._running for index in sequence.features)
        return {span.key: round(self._bytes_per_token * span.image.tokens) for span in spans}

    def images_to_read(self) -> list[ImageInput]:
        """Images that must be encoded and whose patches are absent; their reading begins with this call."""
        missing = list(self._missing_images())
        at_hand = {span.key for span in missing if span.image.patches is not None or span.image.reading}
        under_way = set(self._encode_task.images) if self._encode_task else set()
        images = []
        for span in missing:
            if span.key not in at_hand | under_way and len(at_hand - under_way) < READ_AHEAD:
                at_hand.add(span.key)
                span.image.reading = True
                images.append(span.image)
        return images

    @property
    def reading(self) -> bool:
        """Whether patches that a running sequence needs are being made."""
        return any(span.image.reading for span in self._missing_images())

    def users_of(self, image: ImageInput) -> list[Sequence]:
        """Running sequences that need the features of this very image."""
        return [s for s in self._running if any(s.spans[i].image is image for i in s.missing_images())]

    def encode_done(self, task: EncodeTask, features: list[Any], sizes: list[int]) -> None:
        """Features of each image, and their bytes."""
        self._encode_task = None
        for (key, image), value, size_bytes in zip(task.images.items(), features, sizes, strict=True):
            self._alone.discard(key)
            self._bytes_per_token = size_bytes / image.tokens
            self.encoder_cache.put(key, value, size_bytes, self._held())
            for sequence in self.sequences():
                for span in sequence.spans:
                    if span.key == key:
                        span.image.release()
            for sequence in self._running:
                for index, span in enumerate(sequence.spans):
                    if span.key == key and span.end > sequence.computed:
                        sequence.features[index] = value

    def encode_failed(self, task: EncodeTask) -> list[Sequence]:
        """Drop the task; returns the sequences that wait for it. Those of several images are tried again, each alone."""
        self._encode_task = None
        if len(task.images) > 1:
            self._alone.update(task.images)
            return []
        self._alone.difference_update(task.images)
        return self.waiting_for(task)

    def waiting_for(self, task: EncodeTask) -> list[Sequence]:
        """Running sequences that need one of these images."""
        return [s for s in self._running if any(s.spans[i].key in task.images for i in s.missing_images())]

    def batch(self, chunk_tokens: int) -> Batch:
        """All decoding sequences, and at most `chunk_tokens` tokens of prompts."""
        self._make_room()
        decode = tuple(s for s in self._running if s.decoding)
        # Tokens that a grammar has forced go with those that decode, whatever the limit: they stand for decoding steps.
        forced = [s for s in self._running if s.output_ids and 1 < len(s.keys) - s.computed <= MAX_FORCED_TOKENS]
        forced = [s for s in forced if s.missing_image() is None]
        chunks = [Chunk(s, s.computed, len(s.keys)) for s in forced]
        for sequence in self._by_urgency():
            if sequence.decoding or sequence in forced:
                continue
            # Up to an image that is not encoded yet, if a pass is made for others anyway or that image waits for room.
            waits = sequence.missing_image() is not None and not (decode or self._short_of_room)
            left = 0 if waits else self._end(sequence) - sequence.computed
            if left <= 0:
                continue
            if chunk_tokens <= 0 or (chunks and chunk_tokens < min(left, MIN_SPLIT_TOKENS)):
                break
            chunk = Chunk(sequence, sequence.computed, sequence.computed + min(left, chunk_tokens))
            chunk_tokens -= chunk.end - chunk.start
            chunks.append(chunk)
        return Batch(decode, tuple(chunks))

    def make_room_ahead(self, sequences: tuple[Sequence, ...]) -> bool:
        """Allocate the pages of one token more than is known of each decoding sequence; False if there are not enough."""
        return all(s.block_table is not None and self.kv.append(s.block_table, len(s.keys) + 1) for s in sequences)

    def computed(self, batch: Batch) -> None:
        """Record that the batch has been computed: its keys and values join the prefix cache."""
        for sequence in batch.decode:
            self._store(sequence, sequence.computed + 1)
        for chunk in batch.chunks:
            self._store(chunk.sequence, chunk.end)

    def check(self) -> None:
        """Raise AssertionError unless all slots, pages and cached images are accounted for."""
        self.kv.check()
        self.encoder_cache.check()
        taken = [-1 if s.slot is None else s.slot for s in self._running]
        reserved = [] if self._reserved_slot is None else [self._reserved_slot]
        assert sorted([*taken, *self._free_slots, *reserved]) == list(range(self.slots + 1)), "a slot is lost"
        for sequence in self._running:
            assert sequence.block_table is not None and sequence.computed < len(sequence.keys)
        assert all(s.block_table is None and s.slot is None for s in self._waiting), "a waiting request holds resources"
        if not self._running:
            assert self.kv.used_tokens == 0, "pages are in use without a running request"

    # Slots and pages.

    def _in_line(self) -> list[Sequence]:
        """Those that wait, probes first."""
        return sorted(self._waiting, key=lambda sequence: not sequence.request.probe)

    def _has_slot_for(self, sequence: Sequence, kept: int = 0) -> bool:
        """Whether it can have a slot while `kept` others stay free. A probe has one of its own."""
        if sequence.request.probe and self._reserved_slot is not None:
            return True
        return len(self._free_slots) > (0 if sequence.request.probe else kept)

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and pages for all its tokens; False if it must wait."""
        probe = sequence.request.probe
        # Leave a page for each decoding sequence, or the next step would have to preempt one.
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
        for index, span in enumerate(sequence.spans):
            if span.end <= sequence.computed:
                span.image.release()
            elif (features := self.encoder_cache.get(span.key)) is not None:
                sequence.features[index] = features
                span.image.release()
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
        """Move a sequence back to the head of the queue; its output so far will be prefilled like a prompt."""
        self._stop(sequence, keep=True)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _make_room(self) -> None:
        """Allocate the pages of the tokens that answers have gained; preempt the youngest if none is free."""
        for sequence in list(self._running):
            while sequence.block_table and sequence.output_ids and not self.kv.append(sequence.block_table, len(sequence.keys)):
                self._preempt((self._ordinary() or self._running)[-1])

    def _store(self, sequence: Sequence, tokens: int) -> None:
        assert sequence.block_table is not None
        sequence.computed = tokens
        self.kv.store(sequence.block_table, sequence.keys, tokens)
        for index in [i for i in sequence.features if sequence.spans[i].end <= tokens]:
            del sequence.features[index]

    # Order.

    def _missing_images(self) -> Iterator[ImageSpan]:
        """Those that running sequences need, in the order in which they are encoded."""
        for sequence in self._by_urgency():
            yield from (sequence.spans[index] for index in sequence.missing_images())

    def _by_urgency(self) -> Iterator[Sequence]:
        yield from (s for s in self._running if s.request.probe)
        yield from (s for s in self._running if not s.request.probe)

    def _ordinary(self) -> list[Sequence]:
        """Sequences that may be preempted; probes must not preempt each other forever."""
        return [s for s in self._running if not s.request.probe]

    def _can_share_soon(self, sequence: Sequence) -> bool:
        """Whether another sequence is prefilling a prefix that this one can share."""
        return any(
            not other.decoding
            and other.request.salt == sequence.request.salt
            and common_prefix(other.keys, sequence.keys) - other.computed >= MIN_SHARED_TOKENS
            for other in self._running
        )

    @staticmethod
    def _end(sequence: Sequence) -> int:
        """The token up to which it can be computed: that before an image that is not encoded yet."""
        missing = sequence.missing_image()
        return len(sequence.keys) if missing is None else sequence.spans[missing].start
