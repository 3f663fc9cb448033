"""What travels between the engine and its callers: a request in, events out.

Owns the plain data types. Knows no tensor library: images are opaque here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"  # the model said the same again and again; see SamplingParams.loop_window


class Failure(StrEnum):
    """Why a request ended without an answer."""

    ENGINE = "engine"  # this request's computation raised
    DEAD = "dead"  # the model is gone; no request can be answered any more
    SHUTDOWN = "shutdown"  # the drain deadline passed
    ABORTED = "aborted"  # somebody called abort()
    DEADLINE = "deadline"  # the request's own time limit passed
    MEMORY = "memory"  # the device has not enough memory for this request, even alone


@dataclass(frozen=True)
class ImageInput:
    """One image as the model takes it: flattened patches and their grid (frames, rows, columns)."""

    patches: Any
    grid: tuple[int, int, int]
    tokens: int
    # Hash of what the model sees: pixels, size, processor settings. Empty: shared with no other request.
    key: bytes = b""


class Grammar(Protocol):
    """Which tokens may come next. One stateful object for each request; used in the engine thread only."""

    def allowed(self) -> Any:
        """Bit mask of the tokens allowed next: int32 words [vocabulary / 32], lowest bit first."""

    def accept(self, token: int) -> bool:
        """Move on by one token; False if the grammar does not allow it."""

    def finished(self) -> bool:
        """Whether nothing may follow."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 cut nothing."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    # Stop strings are not looked for inside this opening block, for example a thinking part.
    stop_skips: tuple[str, str] | None = None
    min_p: float = 0.0  # drop tokens less likely than this part of the best one
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # alternatives shown for each token; None: no logprobs at all
    min_tokens: int = 0
    ignore_eos: bool = False
    grammar: Grammar | None = None
    grammar_after: str | None = None  # the grammar holds only after this text
    thinking_tokens: int | None = None  # longest opening thinking block; then `thinking_end_ids` are forced
    thinking_end_ids: tuple[int, ...] = ()
    loop_window: int = 0  # end when the last so many tokens repeat one pattern; 0: never


@dataclass(frozen=True)
class Request:
    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    images: tuple[ImageInput, ...] = ()
    salt: str = ""  # the tenant: nothing is shared between requests of different salt
    probe: bool = False  # a health probe: it may use the reserved slot
    deadline_s: float | None = None  # from submit; past it the request fails


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of chances, from the model's raw logits; `top` is ordered, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """New text (never half a character) and how many tokens went into it."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()  # of those tokens, if asked for


@dataclass(frozen=True)
class Done:
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0  # prompt tokens whose keys and values were still there
    vision_s: float = 0.0  # of prefill_s, while its images went through the vision encoder; 0 if they were known


@dataclass(frozen=True)
class Failed:
    kind: Failure
    message: str


Event = Delta | Done | Failed
