"""One replica of the simulation: slots, a queue, a prefix cache, and an engine that divides its time among all of them.

The engine's time goes to decoding all running answers together (one step gives each a token) and to one prompt after the
other. While both are there a step takes STRETCH times as long as without a prompt, which is the engine's own limit
(`MAX_STEP_STRETCH`): prompts then get 1 - 1/STRETCH of the time, and answers go on at 1/STRETCH of their pace.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

STRETCH = 3.0
NO_WORK_S, NO_TOKENS = 1e-9, 1e-6  # what rounding leaves of something that is complete


@dataclass(frozen=True)
class Times:
    """What a replica takes for work while it has nothing else; seconds."""

    prompt: float  # for any prompt
    token: float  # for each of its tokens that is not in the cache
    picture: float  # more, if its picture is not there
    steps: tuple[tuple[int, float], ...]  # (rows, a step), ascending; between two of them in proportion

    def step(self, rows: int) -> float:
        low_rows, low = self.steps[0]
        for high_rows, high in self.steps:
            if rows <= high_rows:
                return high if high_rows == low_rows else low + (high - low) * (rows - low_rows) / (high_rows - low_rows)
            low_rows, low = high_rows, high
        return low

    def prefill(self, tokens: int, picture: bool) -> float:
        return self.prompt + tokens * self.token + (self.picture if picture else 0.0)


class PrefixCache:
    """The last tokens of each chat that a replica has seen. A chat counts as one entry; the one used longest ago goes first."""

    def __init__(self, tokens: int | None, unspelled_tokens: int = 0) -> None:
        """`tokens`: what it holds; None: everything. `unspelled_tokens`: the end of an answer which the next prompt spells
        in another way, as a chat template may."""
        self._left, self._unspelled = tokens, unspelled_tokens
        self._chats: OrderedDict[str, int] = OrderedDict()

    def use(self, chat: str, prompt_tokens: int, answer_tokens: int) -> int:
        """The tokens of this prompt that were there. The prompt and its answer are there from now on."""
        known = self._chats.pop(chat, 0)
        self._chats[chat] = held = prompt_tokens + answer_tokens - 1  # the last token is never computed
        if self._left is not None:
            self._left += known - held
            while self._left < 0 and len(self._chats) > 1:
                self._left += self._chats.popitem(last=False)[1]
        return min(max(known - self._unspelled, 0), prompt_tokens - 1)


@dataclass(eq=False, slots=True)
class Request:
    chat: str
    turn: int  # from 1
    opening_tokens: int
    prompt_tokens: int
    answer_tokens: int
    asked_at: float
    cached_tokens: int = 0
    work_s: float = 0.0  # of its prompt, that is left
    first_at: float = 0.0
    ended_at: float = 0.0


@dataclass(eq=False, slots=True)
class Replica:
    times: Times
    slots: int
    queue: int
    cache: PrefixCache
    speed: float = 1.0
    done: Callable[[Request], None] = field(default=lambda request: None)
    version: int = 0  # of its rates: an event that was computed before they changed is void
    _at: float = 0.0
    _decoded: float = 0.0  # tokens that a row has got which was there from the beginning
    _prompts: deque[Request] = field(default_factory=deque)
    _rows: list[tuple[float, int, Request]] = field(default_factory=list)  # by the value of `_decoded` at their end
    _waiting: deque[Request] = field(default_factory=deque)
    _entered: int = 0
    _prompt_rate: float = 0.0
    _token_rate: float = 0.0

    @property
    def running(self) -> int:
        return len(self._prompts) + len(self._rows)

    @property
    def full(self) -> bool:
        return self.running + len(self._waiting) >= self.slots + self.queue

    def take(self, request: Request, now: float) -> None:
        self.advance(now)
        self._waiting.append(request)
        self._admit()
        self._set_rates()

    def set_speed(self, speed: float, now: float) -> None:
        self.advance(now)
        self.speed = speed
        self._set_rates()

    def advance(self, now: float) -> None:
        """Computes until `now`, which is not after the next event; `done` is called for what is complete."""
        passed, self._at = now - self._at, now
        if not self.running:
            return
        self._decoded += passed * self._token_rate
        if self._prompts:
            self._prompts[0].work_s -= passed * self._prompt_rate
        changed = False
        while self._prompts and self._prompts[0].work_s <= NO_WORK_S:
            request = self._prompts.popleft()
            request.first_at = now
            self._entered += 1
            heappush(self._rows, (self._decoded + request.answer_tokens - 1, self._entered, request))
            changed = True
        while self._rows and self._rows[0][0] <= self._decoded + NO_TOKENS:
            request = heappop(self._rows)[2]
            request.ended_at = now
            self.done(request)
            changed = True
        if changed:
            self._admit()
            self._set_rates()

    def next_event(self) -> float | None:
        """When a prompt or an answer will be complete, if nothing comes in between."""
        left = math.inf
        if self._prompts:
            left = self._prompts[0].work_s / self._prompt_rate
        if self._rows:
            left = min(left, (self._rows[0][0] - self._decoded) / self._token_rate)
        return None if left == math.inf else self._at + max(left, 0.0)

    def _admit(self) -> None:
        while self._waiting and self.running < self.slots:
            request = self._waiting.popleft()
            request.cached_tokens = self.cache.use(request.chat, request.prompt_tokens, request.answer_tokens)
            picture = request.cached_tokens < request.opening_tokens
            request.work_s = self.times.prefill(request.prompt_tokens - request.cached_tokens, picture)
            self._prompts.append(request)

    def _set_rates(self) -> None:
        self.version += 1
        both = bool(self._prompts and self._rows)
        self._prompt_rate = self.speed * (1 - 1 / STRETCH if both else 1.0)
        self._token_rate = 0.0
        if self._rows:
            self._token_rate = self.speed / (self.times.step(len(self._rows)) * (STRETCH if both else 1.0))
