"""Admission control: limits the requests in progress, from before their images are decoded to their last token.

It limits the number of requests, their tokens and the bytes of their images, and for each key the rate and the concurrency. The engine limits
its own queue too; admission also covers the work before it. A body that is still arriving holds no permit, so that
slow senders cannot block others; the bytes received of such bodies are limited in total, and more strictly for each
key, so that one key cannot block another. Health probes have permits of their own. Called in the event loop only.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable

import psutil

import cgroup
from api.caller import Caller
from api.engine.scheduler import queue_for
from api.errors import (
    queue_full,
    too_many_at_once,
    too_many_bytes,
    too_many_bytes_of_key,
    too_many_image_bytes,
    too_many_in_a_minute,
    too_many_tokens,
)
from api.health.metrics import AdmissionLoad
from api.requests.freed_memory import LARGE_BYTES, FreedMemory
from settings import Settings

PROBES = 2  # at a time: the checker's, and one made by hand
MINUTE_S = 60.0
LEAST_TOKENS, TOKENS_OF_REQUEST = 262_144, 8192
LEAST_IMAGE_BYTES, IMAGE_SHARE = 256 * 2**20, 8  # a part of the memory there is
LARGEST_BODIES = 4  # bodies of the largest size that may be in memory while they arrive
LARGEST_BODIES_OF_KEY = 2


class Admission:
    """`slots` returns how many requests the engine runs at once."""

    def __init__(
        self, settings: Settings, slots: Callable[[], int] = lambda: 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._clock = clock
        self.active = 0
        self.probes = 0
        self.tokens = 0
        self.image_bytes = 0
        self._memory_bytes = memory_bytes()
        self.arriving_bytes = 0
        self._freed_memory = FreedMemory(lambda: bool(self.active or self.probes or self.arriving_bytes))
        self._arriving_of_key: Counter[str] = Counter()
        self._of_key: Counter[str] = Counter()
        self._recent_of_key: defaultdict[str, deque[float]] = defaultdict(deque)

    @property
    def queue_size(self) -> int:
        """Requests that may wait."""
        return self._settings.queue_size or queue_for(self._slots())

    @property
    def queue_tokens(self) -> int:
        """Tokens of all requests in progress: with nothing set, long thoughts of all that may run and wait."""
        by_requests = TOKENS_OF_REQUEST * (self._slots() + self.queue_size)
        return self._settings.queue_tokens or max(LEAST_TOKENS, by_requests)

    @property
    def queue_image_bytes(self) -> int:
        """Bytes of the images of all requests in progress."""
        return self._settings.queue_image_bytes or max(LEAST_IMAGE_BYTES, self._memory_bytes // IMAGE_SHARE)

    def check(self, caller: Caller) -> None:
        """Raises what `admit` would raise now; counts nothing."""
        if not caller.probe:
            self._check_rate(caller.name)
        self._check_room(caller, 1)

    def admit(self, caller: Caller) -> Permit:
        """A permit for one request. Raises the 429 error of a key's own limits, or the 503 error when full."""
        permit = Permit(self, caller)
        if not caller.probe and (recent := self._check_rate(caller.name)) is not None:
            recent.append(self._clock())
        permit.take_requests(1)
        return permit

    def load(self) -> AdmissionLoad:
        return AdmissionLoad(self.active, self.tokens, self.arriving_bytes)

    def arriving(self, caller: Caller) -> ArrivingBody:
        """A context in which the bytes of one arriving body are counted."""
        return ArrivingBody(self, caller)

    def _check_rate(self, key: str) -> deque[float] | None:
        """The times of this key's requests in the last minute, if their rate is limited. Raises the 429 error."""
        limit = self._settings.key_requests_per_minute
        if not limit:
            return None
        now, recent = self._clock(), self._recent_of_key[key]
        while recent and now - recent[0] >= MINUTE_S:
            recent.popleft()
        if len(recent) >= limit:
            raise too_many_in_a_minute(limit, MINUTE_S - (now - recent[0]))
        return recent

    def _take_requests(self, caller: Caller, requests: int) -> None:
        self._check_room(caller, requests)
        if caller.probe:
            self.probes += requests
            return
        self.active += requests
        self._of_key[caller.name] += requests

    def _check_room(self, caller: Caller, requests: int) -> None:
        if caller.probe:
            if self.probes + requests > PROBES:
                raise queue_full(PROBES)
            return
        limit = self._settings.key_concurrency
        if limit and self._of_key[caller.name] + requests > limit:
            raise too_many_at_once(limit)
        if self.active + requests > self.queue_size + self._slots():
            raise queue_full(self.queue_size)

    def _arrive(self, caller: Caller, size: int) -> None:
        largest = self._settings.max_body_bytes
        if not caller.probe:
            if self._arriving_of_key[caller.name] + size > LARGEST_BODIES_OF_KEY * largest:
                raise too_many_bytes_of_key(LARGEST_BODIES_OF_KEY * largest)
            if self.arriving_bytes + size > LARGEST_BODIES * largest:
                raise too_many_bytes(LARGEST_BODIES * largest)
        self._count_arriving(caller, size)

    def _count_arriving(self, caller: Caller, size: int) -> None:
        self.arriving_bytes += size
        self._arriving_of_key[caller.name] += size
        if not self._arriving_of_key[caller.name]:
            del self._arriving_of_key[caller.name]

    def _take_tokens(self, caller: Caller, tokens: int) -> None:
        limit = self.queue_tokens
        # A request that is larger than the limit is admitted alone.
        if not caller.probe and self.tokens and self.tokens + tokens > limit:
            raise too_many_tokens(limit, self.tokens, tokens)
        self.tokens += tokens

    def _take_image_bytes(self, caller: Caller, size: int) -> None:
        limit = self.queue_image_bytes
        # A request that is larger than the limit is admitted alone.
        if not caller.probe and size and self.image_bytes and self.image_bytes + size > limit:
            raise too_many_image_bytes(limit, size)
        self.image_bytes += size

    def _release(self, caller: Caller, requests: int, tokens: int, image_bytes: int) -> None:
        self.tokens -= tokens
        self.image_bytes -= image_bytes
        if caller.probe:
            self.probes -= requests
            return
        self.active -= requests
        self._of_key[caller.name] -= requests
        if not self._of_key[caller.name]:
            del self._of_key[caller.name]


def memory_bytes() -> int:
    """Of the machine, or of the container if that may have less."""
    total = psutil.virtual_memory().total
    group = cgroup.memory(total)
    return group.limit_bytes if group else total


class Permit:
    """The share of the limits that one request holds. `release` may be called more than once."""

    def __init__(self, admission: Admission, caller: Caller) -> None:
        self._admission = admission
        self.caller = caller
        self._requests = 0
        self._tokens = 0
        self._image_bytes = 0

    def take_requests(self, requests: int) -> None:
        """Count more requests to the engine: each choice is one. Raises the 429 or 503 error."""
        self._admission._take_requests(self.caller, requests)
        self._requests += requests

    def take_tokens(self, tokens: int) -> None:
        """Count the tokens of the prompt, images included, and of the longest answer. Raises the 503 error."""
        self._admission._take_tokens(self.caller, tokens)
        self._tokens += tokens

    def take_image_bytes(self, size: int) -> None:
        """Count the bytes of the images, as uploaded and as pixels. Raises the 503 error."""
        self._admission._take_image_bytes(self.caller, size)
        self._image_bytes += size

    def keep_image_bytes(self, size: int) -> None:
        """Count no more than these any longer."""
        freed = max(0, self._image_bytes - size)
        self._image_bytes -= freed
        self._admission.image_bytes -= freed

    def release(self) -> None:
        requests, tokens, image_bytes = self._requests, self._tokens, self._image_bytes
        self._requests = self._tokens = self._image_bytes = 0
        if requests or tokens or image_bytes:
            self._admission._release(self.caller, requests, tokens, image_bytes)


class ArrivingBody:
    """Bytes received of one body; no longer counted after the `with` block."""

    def __init__(self, admission: Admission, caller: Caller) -> None:
        self._admission = admission
        self._caller = caller
        self._size = 0

    def __enter__(self) -> ArrivingBody:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission._count_arriving(self._caller, -self._size)
        if self._size >= LARGE_BYTES:
            self._admission._freed_memory.expect()

    def add(self, size: int) -> None:
        """Count more bytes. Raises the 429 error of a key's own limit, or the 503 error when full."""
        self._admission._arrive(self._caller, size)
        self._size += size
