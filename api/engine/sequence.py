"""A sequence: the tokens of one request on their way through the engine, and how far they are computed.

Only the engine thread writes to it, except for the flags `aborted` and `closed`. Knows no tensor library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from api.engine.encoder_cache import ImageKey
from api.engine.kv_cache import BlockTable, Key
from api.engine.request import Delta, Done, Event, FinishReason, ImageInput, Request, TokenLogprob


@dataclass(frozen=True)
class ImageSpan:
    """The image tokens of one image: `start` to `end` of the prompt."""

    start: int
    end: int
    image: ImageInput
    key: ImageKey


@dataclass(eq=False)
class Sequence:
    request: Request
    deliver: Callable[[Event], None]
    spans: tuple[ImageSpan, ...] = ()
    keys: list[Key] = field(default_factory=list)  # prefix cache keys of all tokens so far; see kv_cache
    output_ids: list[int] = field(default_factory=list)

    # Set while it has a slot.
    slot: int | None = None
    block_table: BlockTable | None = None
    computed: int = 0  # tokens whose keys and values are stored
    features: dict[int, Any] = field(default_factory=dict)  # image features by span, until their tokens are computed

    state: Any = None  # owned by the runner
    random_seed: int = 0  # drawn once if the request has none
    output: Any = None  # text.output.OutputState

    aborted: bool = False  # to be ended before the next step
    closed: bool = False  # its last event has been delivered

    # For events and statistics.
    undelivered_tokens: int = 0
    undelivered_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0
    vision_s: float = 0.0
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        if not self.keys:
            self.keys = list(self.request.prompt_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.request.prompt_ids, *self.output_ids)

    @property
    def decoding(self) -> bool:
        """Whether only its last token is still to be computed."""
        return bool(self.output_ids) and self.computed == len(self.keys) - 1

    def append(self, token: int) -> None:
        self.output_ids.append(token)
        self.keys.append(token)

    def take(self, token: int, logprob: TokenLogprob | None) -> tuple[str, FinishReason | None]:
        """Append the sampled token, and those that a grammar then leaves no choice about: they are computed in one chunk.
        Returns their text, and the reason if one of them was the last. Raises GrammarViolation."""
        text, reason = self._take(token)
        if logprob is not None:
            self.undelivered_logprobs.append(logprob)
        if reason:
            return text, reason
        for forced in self.output.forced_by_grammar():
            more, reason = self._take(forced)
            text += more
            if reason:
                break
        return text, reason

    def _take(self, token: int) -> tuple[str, FinishReason | None]:
        taken = self.output.feed(token)
        self.append(token)
        self.undelivered_tokens += 1
        return taken

    def missing_image(self) -> int | None:
        """Index of the first span whose features are needed and not available."""
        return next(iter(self.missing_images()), None)

    def missing_images(self) -> list[int]:
        """Indices of all such spans."""
        spans = enumerate(self.spans)
        return [index for index, span in spans if span.end > self.computed and index not in self.features]

    def overdue(self, now: float) -> bool:
        limit = self.request.deadline_s
        return limit is not None and now - self.submitted_at > limit

    def facts(self, now: float) -> dict[str, Any]:
        """Its progress, without its content."""
        return {
            "id": self.request.id,
            "age_s": round(now - self.submitted_at, 1),
            "running": self.slot is not None,
            "prompt_tokens": len(self.request.prompt_ids),
            "pictures": len(self.request.images),
            "computed_tokens": self.computed,
            "answer_tokens": len(self.output_ids),
        }

    def delta(self, text: str) -> Delta:
        """The event of text that can no longer change, with what has gathered since the last."""
        delta = Delta(text, self.undelivered_tokens, tuple(self.undelivered_logprobs))
        self.undelivered_tokens = 0
        self.undelivered_logprobs.clear()
        return delta

    def done(self, reason: FinishReason) -> Done:
        now = time.monotonic()
        started = self.started_at or now
        first = self.first_token_at or now
        return Done(
            reason=reason,
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self.output_ids),
            queue_s=started - self.submitted_at,
            prefill_s=first - started,
            decode_s=now - first,
            cached_tokens=self.cached_tokens,
            vision_s=self.vision_s,
            stop_string=self.output.stop_string if self.output is not None else None,
        )


def make_sequence(request: Request, deliver: Callable[[Event], None], image_token_id: int) -> Sequence:
    """Locate the image tokens in the prompt. Raises ValueError unless they match the images exactly."""
    keys: list[Key] = list(request.prompt_ids)
    spans = []
    end = 0
    for number, image in enumerate(request.images):
        # An image without a content key is never shared, not even with itself in another request.
        content = image.key or os.urandom(16)
        try:
            start = request.prompt_ids.index(image_token_id, end)
        except ValueError:
            raise ValueError(f"image {number} has no tokens in the prompt") from None
        end = start + image.tokens
        if request.prompt_ids[start:end] != (image_token_id,) * image.tokens:
            raise ValueError(f"image {number} must have {image.tokens} tokens in a row in the prompt")
        keys[start:end] = [content] * image.tokens
        spans.append(ImageSpan(start, end, image, (request.salt, content)))
    if image_token_id in request.prompt_ids[end:]:
        raise ValueError(f"the prompt has image tokens for more than its {len(request.images)} images")
    return Sequence(request, deliver, tuple(spans), keys)
