"""A fleet of simulated replicas behind a router, event by event. The same chats and seed give the same result."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from bench.fleet_chats import Chat
from bench.fleet_replica import Replica, Request
from bench.fleet_routers import Router
from bench.report import percentile

TRIES = 2  # replicas that are asked before a request is refused: `proxy_next_upstream_tries` of docs/scaling.md


@dataclass
class Result:
    """Of the requests that were asked in the time that counts. Times in seconds."""

    firsts: array[float] = field(default_factory=lambda: array("d"))  # time to the first token
    later_firsts: array[float] = field(default_factory=lambda: array("d"))  # of second and later turns
    wholes: array[float] = field(default_factory=lambda: array("d"))  # time to the last token
    prompt_tokens: int = 0
    cached_tokens: int = 0
    later: int = 0  # second and later turns
    found: int = 0  # of those, the ones whose picture was in the cache
    refused: int = 0
    of_replica: list[int] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.wholes)

    @property
    def token_hits(self) -> float:
        """The part of all prompt tokens that were cached."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def turn_hits(self) -> float:
        """The part of second and later turns that found their picture."""
        return self.found / self.later if self.later else 0.0

    @property
    def fullest(self) -> float:
        """Requests of the replica with most of them, in those of the average one."""
        return max(self.of_replica) * len(self.of_replica) / max(sum(self.of_replica), 1)

    def first_s(self, share: float) -> float:
        return percentile(self.firsts, share) or 0.0

    def later_first_s(self, share: float) -> float:
        return percentile(self.later_firsts, share) or 0.0

    def whole_s(self, share: float) -> float:
        return percentile(self.wholes, share) or 0.0

    def add(self, request: Request) -> None:
        self.firsts.append(request.first_at - request.asked_at)
        self.wholes.append(request.ended_at - request.asked_at)
        self.prompt_tokens += request.prompt_tokens
        self.cached_tokens += request.cached_tokens
        if request.turn > 1:
            self.later += 1
            self.found += request.cached_tokens >= request.opening_tokens
            self.later_firsts.append(request.first_at - request.asked_at)


class Fleet:
    """What is asked from `since_s` to `until_s` counts. `shared_speed`: the speed of each replica by how many compute at
    once, where they share a machine."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        router: Router,
        since_s: float = 0.0,
        until_s: float = math.inf,
        shared_speed: Callable[[int], float] | None = None,
    ) -> None:
        self._replicas, self._router, self._shared_speed = replicas, router, shared_speed
        self._since_s, self._until_s = since_s, until_s
        self._open = 0  # requests under way that count
        self._events: list[tuple[float, int, int, int, tuple[Chat, int, int] | None]] = []
        self._number = 0
        self._now = 0.0
        self._asked: dict[Request, tuple[Chat, int]] = {}  # and the replica
        self._result = Result(of_replica=[0] * len(replicas))
        for replica in replicas:
            replica.done = self._done

    def run(self, chats: Iterable[Chat]) -> Result:
        """Until all that counts is answered. Chats must come in the order in which they begin."""
        coming = iter(chats)
        chat = next(coming, None)
        while (chat or self._events) and (self._now < self._until_s or self._open):
            if chat and (not self._events or chat.begins_s <= self._events[0][0]):
                self._now = chat.begins_s
                self._ask(chat, 1, 0)
                chat = next(coming, None)
                continue
            self._now, _, number, version, turn = heappop(self._events)
            if turn:
                self._ask(*turn)
            elif (replica := self._replicas[number]).version == version:
                replica.advance(self._now)
                self._changed(number)
        return self._result

    def _ask(self, chat: Chat, turn: int, history_tokens: int) -> None:
        """`history_tokens`: of the questions and answers before, without the opening."""
        this = chat.turns[turn - 1]
        prompt = chat.opening_tokens + history_tokens + this.question_tokens
        request = Request(chat.name, turn, chat.opening_tokens, prompt, this.answer_tokens, self._now)
        tried: list[int] = []
        while len(tried) < TRIES and (number := self._router.choose(chat.name, tried)) is not None:
            if not self._replicas[number].full:
                self._asked[request] = (chat, number)
                self._router.began(number)
                if self._counts(request):
                    self._open += 1
                    self._result.of_replica[number] += 1
                self._replicas[number].take(request, self._now)
                self._changed(number)
                return
            tried.append(number)
        self._result.refused += self._counts(request)  # this user gives up

    def _done(self, request: Request) -> None:
        chat, number = self._asked.pop(request)
        self._router.ended(number)
        if self._counts(request):
            self._open -= 1
            self._result.add(request)
        if request.turn < len(chat.turns):
            history = request.prompt_tokens - chat.opening_tokens + request.answer_tokens
            self._push(self._now + chat.turns[request.turn].pause_s, 0, 0, (chat, request.turn + 1, history))

    def _counts(self, request: Request) -> bool:
        return self._since_s <= request.asked_at < self._until_s

    def _changed(self, number: int) -> None:
        """Plans the next event of a replica, and of all others if they share its machine."""
        if self._shared_speed:
            speed = self._shared_speed(sum(replica.running > 0 for replica in self._replicas))
            for other, replica in enumerate(self._replicas):
                if replica.speed != speed:
                    replica.set_speed(speed, self._now)
                    if other != number:
                        self._plan(other)
        self._plan(number)

    def _plan(self, number: int) -> None:
        replica = self._replicas[number]
        if (moment := replica.next_event()) is not None:
            self._push(max(moment, self._now), number, replica.version, None)

    def _push(self, moment: float, number: int, version: int, turn: tuple[Chat, int, int] | None) -> None:
        self._number += 1
        heappush(self._events, (moment, self._number, number, version, turn))
