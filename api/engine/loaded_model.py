"""What a loaded model offers: its runner, its tokens, its template, its image processing.

Only the shape of it. `loader` fills it from a checkpoint, `fake` from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

from api.engine.kv_cache import Copy
from api.engine.request import ImageInput, TokenLogprob
from api.engine.scheduler import Batch, EncodeTask
from api.engine.sequence import Sequence
from api.engine.text.tokenizer import Vocabulary


class LoadError(Exception):
    """The model cannot be loaded; the message is written for the operator."""


class Runner(Protocol):
    """Every forward pass. Reads a request's tokens, pages and features from its Sequence.

    A call that raises has changed nothing that matters: the same work may be asked for again.
    """

    def warm_up(self) -> None:
        """Try every kind of step once: the first request pays for no set-up, a broken model shows now."""

    def encode(self, job: EncodeTask, limit_s: float) -> Any | None:
        """Go on with an image for about `limit_s`; its features once they are complete."""

    def size_bytes(self, features: Any) -> int:
        """Memory that features take."""

    def copy_pages(self, copies: Items[Copy]) -> None:
        """Copy beginnings of KV pages, in this order."""

    def compute(self, batch: Batch) -> list[SampledToken]:
        """One forward pass: the next token of each decoding sequence, then of each chunk that ends its prompt."""

    def begin(self, sequence: Sequence) -> None:
        """A sequence has been given its slot."""

    def failure(self, error: BaseException) -> Literal["request", "memory", "device"]:
        """What an error says: this work cannot be done, there is too little memory, or the device is lost."""


class Template(Protocol):
    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, enable_thinking: bool) -> str: ...


class ImageProcessor(Protocol):
    """Called from the preprocessing threads."""

    def count_tokens(self, width: int, height: int) -> int: ...

    def process(self, image: Image.Image) -> ImageInput: ...


class SampledToken(NamedTuple):
    """A token, and what the model thought of it if the request wants to know."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Capacity:
    """What the model has room for at once."""

    slots: int
    pages: int  # of the KV cache
    page_tokens: int
    chunk_tokens: int  # longest part of a prompt in one step
    encoder_cache_bytes: int


@dataclass(frozen=True)
class SamplingDefaults:
    """From the checkpoint's generation config; a request overrides each."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Model:
    id: str
    runner: Runner
    vocabulary: Vocabulary
    template: Template
    image_processor: ImageProcessor
    end_ids: frozenset[int]
    context_tokens: int
    capacity: Capacity
    defaults: SamplingDefaults = SamplingDefaults()
    image_token: str = "<|image|>"
    # Facts for people: class, parameters, device, dtype, threads, knows, choices.
    facts: dict[str, Any] = field(default_factory=dict)
