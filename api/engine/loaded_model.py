"""A loaded model as the engine and the request preprocessing use it: runner, vocabulary, chat template, image processor.

The loader fills it from a checkpoint, tests from nothing. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

from api.engine.guard import Integrity
from api.engine.kv_cache import Copy
from api.engine.request import ImageInput, TokenLogprob
from api.engine.scheduler import Batch, EncodeTask, Packing
from api.engine.sequence import Sequence
from api.engine.text.tokenizer import Vocabulary


class LoadError(Exception):
    """The model cannot be loaded; the message is written for the operator."""


class Runner(Protocol):
    """Computes every forward pass. Reads tokens, pages and features from the Sequence. Engine thread only.

    A call that raises leaves the state consistent: the engine may repeat the same work, or a part of it.
    """

    overlaps: bool  # whether it is an OverlappingRunner
    free_rows: int  # up to so many rows a pass takes about as long as for one: it is bound by reading the weights

    def warm_up(self) -> None:
        """Run every kind of step once, so that the first request pays for no set-up and a broken model fails now."""

    packing: Packing  # which images it encodes together

    def encode(self, task: EncodeTask, limit_s: float) -> list[Any] | None:
        """Continue encoding images for about `limit_s`; returns the features of each once they are complete."""

    def size_bytes(self, features: Any) -> int:
        """Of one image."""

    def copy_pages(self, copies: Items[Copy]) -> None:
        """Copy the first tokens of KV pages, in this order."""

    def clear_pages(self, pages: Items[int]) -> None:
        """Fill KV pages with zeros."""

    def begin(self, sequence: Sequence) -> None:
        """Prepare for a sequence that has been given its slot."""

    def compute(self, batch: Batch) -> list[SampledToken]:
        """One forward pass: the next token of each decoding sequence, then of each chunk that ends its prompt."""

    def prepare_next(self) -> bool:
        """Prepare one more of the things that make later steps faster, while there is nothing to do. False: none is left."""

    def close(self) -> None:
        """Give back the memory of a device. Nothing can be computed afterwards."""

    def failure(self, error: BaseException) -> Literal["request", "memory", "device"]:
        """The scope of an error: this work cannot be computed, there is too little memory, or the device is lost."""


class Flight(Protocol):
    """A step that has been queued on a device."""

    @property
    def seconds(self) -> float:
        """What it took the device, once it is collected."""


class OverlappingRunner(Runner, Protocol):
    """A runner of a device that computes while the host does something else. Steps are computed in the order of launching."""

    # Of steps that `warm_up` has computed: sequences that decode, tokens of prompts, seconds.
    costs: list[tuple[int, int, float]]

    def launch(self, batch: Batch) -> Flight:
        """Queue what `compute` does, and return at once."""

    def wait_for_slices(self) -> None:
        """Wait for the slices of images that have been queued: `encode` only queues them."""

    def launch_next(self, flight: Flight, sequences: tuple[Sequence, ...]) -> Flight | None:
        """Queue the step after `flight`, which is not collected yet, for these of its sequences: each decodes one token
        more, whatever `flight` samples. None if that cannot be done."""

    def collect(self, flight: Flight) -> list[SampledToken]:
        """Wait for a step and return its tokens; those of sequences that have ended since have no meaning."""

    def settle(self, flight: Flight) -> None:
        """Wait for a step whose tokens are not wanted any more."""


class Template(Protocol):
    """Called from the preprocessing threads."""

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, enable_thinking: bool) -> str: ...


class ImageProcessor(Protocol):
    """Called from the preprocessing threads."""

    def count_tokens(self, width: int, height: int) -> int:
        """Image tokens of an image of this size, in pixels."""

    def count_bytes(self, width: int, height: int) -> int:
        """Memory that an image of this size, in pixels, takes until it is encoded."""

    def process(self, image: Image.Image) -> ImageInput: ...

    @property
    def settings_key(self) -> bytes:
        """Differs between processors that make different things of an image."""


class CheckpointTemplate:
    """The chat template of a checkpoint, rendered by its `transformers` tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, enable_thinking: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )


class SampledToken(NamedTuple):
    """The token chosen from the probabilities, with its log probability if the request asks for it."""

    token: int
    logprob: TokenLogprob | None = None
    finite: bool = True  # False: the logits of its row were not finite numbers, and the token means nothing


@dataclass(frozen=True)
class Capacity:
    """Upper limits of what the model computes and stores at once."""

    slots: int
    pages: int  # of the KV cache
    page_tokens: int
    chunk_tokens: int  # most prompt tokens in one step
    encoder_cache_bytes: int


@dataclass(frozen=True)
class AnswerLimits:
    """Tokens of the longest answer of a request that sets no limit."""

    plain: int = 2048
    thinking: int = 4096  # with its thought, which ends early enough to leave room for what follows

    def of(self, thinking: bool) -> int:
        return self.thinking if thinking else self.plain


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
    answer: AnswerLimits = AnswerLimits()
    image_token: str = "<|image|>"
    integrity: Integrity | None = None  # None: the model cannot be checked
    # For `GET /info`: class, parameters, device, dtype, threads, knows, choices.
    facts: dict[str, Any] = field(default_factory=dict)
