"""What a loaded model offers: its runner, its tokens, its template, its picture processing.

Only the shape of it. `loader` fills it from a checkpoint, `fake` from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from api.engine.request import Picture, Sequence
from api.engine.tokens import Vocabulary


class LoadError(Exception):
    """The model cannot be loaded; the message is written for the operator."""


class Runner(Protocol):
    """Every forward pass. Keeps what it needs for a request in `sequence.state`."""

    def encode_picture(self, sequence: Sequence) -> None:
        """Encode the next picture of a request."""

    def prefill(self, sequence: Sequence) -> int:
        """Read the whole prompt and return the first token."""

    def decode(self, sequences: Items[Sequence]) -> list[int]:
        """One more token for each."""

    def is_fatal(self, error: BaseException) -> bool:
        """Whether the device is lost, so that no later step can work."""


class Template(Protocol):
    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, enable_thinking: bool) -> str: ...


class PictureProcessor(Protocol):
    """Called from the preprocessing threads."""

    def count_tokens(self, width: int, height: int) -> int: ...

    def process(self, image: Image.Image) -> Picture: ...


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
    pictures: PictureProcessor
    end_ids: frozenset[int]
    context_tokens: int
    defaults: SamplingDefaults = SamplingDefaults()
    image_token: str = "<|image|>"
    # Facts for people: class, parameters, device, dtype, threads, knows, choices.
    facts: dict[str, Any] = field(default_factory=dict)
