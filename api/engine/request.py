"""The interface of the engine: a request goes in, events come out.

Plain data types without a tensor library: images are opaque here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"  # the output repeats itself; see SamplingParams.loop_window


class Failure(StrEnum):
    """Why a request ended without an answer."""

    ENGINE = "engine"  # this request's computation raised
    DEAD = "dead"  # the engine thread has ended; the process must be restarted
    SHUTDOWN = "shutdown"  # the drain deadline passed
    ABORTED = "aborted"  # abort() was called
    DEADLINE = "deadline"  # the request's own time limit passed
    RELOAD = "reload"  # it ran for too long while the weights were to be loaded again
    NONFINITE = "nonfinite_logits"  # its logits were not finite numbers: the model or the device computes wrongly
    GRAMMAR = "grammar"  # its grammar could not be followed: too complex for the parser, or no text satisfies it
    MEMORY = "out_of_memory"  # the device has not enough memory for this request, even alone


# Called once, in any thread, with the patches of an image or with the error for which there are none.
Receive = Callable[[Any], None]


@dataclass(eq=False)
class ImageInput:
    """One preprocessed image: its patches, and their grid (frames, rows, columns).

    The patches are the largest part of a request, and needed only while the image is encoded: they may be absent, if
    `read` can bring them.
    """

    patches: Any | None
    grid: tuple[int, int, int]
    tokens: int
    # Hash of the preprocessed image: pixels, size, processor settings. Empty: shared with no other request.
    key: bytes = b""
    # Makes the patches again from what was uploaded; returns at once. None: they cannot be made again.
    read: Callable[[Receive], None] | None = None
    reading: bool = False  # whether they are being made

    def release(self) -> None:
        """Let go of the patches, if they can be made again."""
        if self.read is not None:
            self.patches = None


class Grammar(Protocol):
    """The tokens allowed next. One stateful object for each request, used by the engine thread only."""

    def allowed(self) -> Any:
        """Bit mask of the tokens allowed next: int32 words [ceil(vocabulary / 32)], lowest bit first."""

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as only one text can."""

    def accept(self, token: int) -> bool:
        """Advance by one token; False if the grammar does not allow it."""

    def finished(self) -> bool:
        """Whether no token may follow."""

    @property
    def failed(self) -> str:
        """The error that stopped it, or an empty string."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # the stop string that was found is part of the text
    stop_token_ids: frozenset[int] = frozenset()  # tokens that end the output besides the model's end tokens
    # Tags of an opening block in which stop strings are ignored: thinking.
    stop_skips: tuple[str, str] | None = None
    min_p: float = 0.0  # drop tokens less probable than this fraction of the most probable one
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # alternatives returned for each token; None: no logprobs
    min_tokens: int = 0
    ignore_eos: bool = False
    grammar: Grammar | None = None
    grammar_after: str | None = None  # the grammar applies only after this text
    thinking_tokens: int | None = None  # limit of the opening thinking block; then `thinking_end_ids` are forced
    thinking_end_ids: tuple[int, ...] = ()
    loop_window: int = 0  # finish when this many last tokens repeat one pattern; 0: never


@dataclass(frozen=True)
class Request:
    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    images: tuple[ImageInput, ...] = ()
    salt: str = ""  # the tenant: caches are not shared between requests of different salts
    probe: bool = False  # a health probe: it may use the reserved slot
    deadline_s: float | None = None  # from submit; past it the request fails


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log probabilities from the raw logits; `top` (token id, logprob) is ordered, most probable first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """New text in whole characters, and the number of tokens it was made from."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()  # of those tokens, if the request asks for them


@dataclass(frozen=True)
class Done:
    """The request has finished. Times are seconds: until its first step, until its first token, from then on."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    vision_s: float = 0.0  # part of prefill_s in which its images were encoded; 0 if all were cached
    stop_string: str | None = None  # of the request's stop strings, the one that ended it


@dataclass(frozen=True)
class Failed:
    kind: Failure
    message: str


Event = Delta | Done | Failed
