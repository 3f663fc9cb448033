"""Chats with a picture at their beginning, drawn by a seed: the same ones for the simulation and for real servers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    pause_s: float  # from the end of the answer before; 0 in the first turn
    question_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Chat:
    name: str  # its x-session-id
    begins_s: float
    opening_tokens: int  # of the picture and what else the first message has before its question
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Traffic:
    """Chats that begin at random (Poisson), each with `turns` questions and pauses of `pause_s` on average (exponential).

    The length of an answer is even between half and one and a half of `answer_tokens`.
    """

    chats_per_s: float
    turns: int
    pause_s: float
    opening_tokens: int
    question_tokens: int
    answer_tokens: int

    def chats(self, seed: int | str, duration_s: float) -> Iterator[Chat]:
        """Those that begin within the duration, in their order."""
        rng = random.Random(f"chats {seed}")
        now = 0.0
        while (now := now + rng.expovariate(self.chats_per_s)) < duration_s:
            yield Chat(f"{rng.getrandbits(64):016x}", now, self.opening_tokens, tuple(self._turns(rng)))

    def _turns(self, rng: random.Random) -> Iterator[Turn]:
        for number in range(self.turns):
            pause_s = rng.expovariate(1 / self.pause_s) if number and self.pause_s else 0.0
            answer = max(1, round(self.answer_tokens * rng.uniform(0.5, 1.5)))
            yield Turn(pause_s, self.question_tokens, answer)
