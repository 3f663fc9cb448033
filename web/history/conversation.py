"""The turns of one chat, and which of them are sent with the next question.

Owns turns, their images and the rule of what is resent. Knows nothing of Streamlit, HTTP or SQLite. A turn is changed
in place while its answer streams, so that an interrupted run loses nothing. chats.db stores fields with an alias under
their alias, because its keys must not change.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from web.api_client.answer_stream import (
    BoundingBox,
    Event,
    Finished,
    InvalidBox,
    Loading,
    Queued,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from web.api_client.client import ApiError
from web.images.attached_image import AttachedImage

State = Literal["waiting", "thinking", "writing", "done", "stopped", "failed"]
UNFINISHED: tuple[State, ...] = ("waiting", "thinking", "writing")
# The same images would fail again after these errors, so the next question does not carry them.
REFUSALS = ("refused", "too_large", "too_long")
TITLE_LENGTH = 60
MAX_TOOL_CALLS = 64  # in one answer; an index beyond it is ignored

UrlOf = Callable[[AttachedImage], str]  # the URL to send: a data: URL, or a remote one that the API fetches


@dataclass(frozen=True)
class Failure:
    """The part of an ApiError that is stored with a failed answer."""

    kind: str
    detail: str = ""
    request_id: str = ""


@dataclass
class ToolCall:
    """A tool call of the model. `arguments`: JSON as the model wrote it."""

    name: str
    arguments: str = ""
    id: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the arguments are a JSON object; a call that was cut off cannot be sent back."""
        try:
            return isinstance(json.loads(self.arguments), dict)
        except ValueError:
            return False


@dataclass(frozen=True)
class ToolResult:
    """The result of the tool call with this id."""

    id: str
    name: str
    text: str


@dataclass
class Answer:
    """One answer. `sent`: hashes of the request's images in order, indexed by `BoundingBox.image`.

    `question`: the question that it answered, if that was edited later. `schema`: the JSON schema that was requested
    ({}: any JSON; None: free text). `begun`, `thinking_began`: monotonic seconds.
    """

    state: State = "waiting"
    question: str = ""
    text: str = ""
    reasoning: str = ""
    boxes: list[BoundingBox] = field(default_factory=list)
    invalid_boxes: Annotated[int, Field(alias="no_places")] = 0  # with coordinates outside 0-1000
    calls: list[ToolCall] = field(default_factory=list)
    sent: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    queue_position: int | None = None
    loading: bool = False
    loading_progress: float | None = None
    begun: float = field(default_factory=time.monotonic)
    thinking_began: float | None = None
    thinking_s: float | None = None
    finish: Finished | None = None
    error: Failure | None = None

    @property
    def unfinished(self) -> bool:
        return self.state in UNFINISHED

    @property
    def has_content(self) -> bool:
        return bool(self.text.strip() or self.boxes or self.calls)

    @property
    def was_cut_off(self) -> bool:
        """It has text but ended early: by its maximum length, by Stop or by a broken connection."""
        by_length = self.finish is not None and self.finish.reason == "length"
        return bool(self.text.strip()) and (by_length or self.state in ("stopped", "failed"))

    @property
    def awaits_tool_results(self) -> bool:
        return self.state == "done" and bool(self.calls) and all(call.is_complete for call in self.calls)

    def apply(self, event: Event, now: float) -> None:
        if not self.unfinished:
            return  # stopped from another thread
        self.loading = isinstance(event, Loading)
        match event:
            case Queued(position):
                self.queue_position = position
            case Loading(progress):
                self.loading_progress = progress
            case ReasoningDelta(text):
                self.state = "thinking"
                self.thinking_began = self.thinking_began or now
                self.reasoning += text
            case TextDelta(text):
                self._end_thinking(now)
                self.state = "writing"
                self.text += text
            case BoundingBox():
                self.boxes.append(event)
            case InvalidBox():
                self.invalid_boxes += 1
            case ToolCallDelta():
                self._end_thinking(now)
                self.state = "writing"
                self._append_tool_call(event)
            case Finished():
                self._end_thinking(now)
                self.state = "done"
                self.finish = event

    def fail(self, error: ApiError, now: float) -> None:
        self._end_thinking(now)
        self.state = "failed"
        self.error = Failure(error.kind, error.detail, error.request_id)

    def stop(self, now: float) -> None:
        if self.unfinished:
            self._end_thinking(now)
            self.state = "stopped"

    def _append_tool_call(self, delta: ToolCallDelta) -> None:
        while len(self.calls) <= delta.index < MAX_TOOL_CALLS:
            self.calls.append(ToolCall(""))
        if delta.index < len(self.calls):
            call = self.calls[delta.index]
            call.name, call.arguments = call.name or delta.name, call.arguments + delta.arguments
            call.id = call.id or delta.id or f"call_{delta.index}"

    def _end_thinking(self, now: float) -> None:
        if self.thinking_began is not None and self.thinking_s is None:
            self.thinking_s = now - self.thinking_began


@dataclass
class Turn:
    """A question, the hashes of its images, and its answer. `sample`: the file name of its sample image.

    `earlier`: answers that were replaced by a retry, oldest first. `results`: instead of a question, the results of the
    tools that the previous answer called. `left_out`: its images are shown but no longer sent. `asked_at`: Unix time.
    """

    question: str
    images: Annotated[tuple[str, ...], Field(alias="pictures")] = ()
    sample: str | None = None
    answer: Answer = field(default_factory=Answer)
    earlier: list[Answer] = field(default_factory=list)
    results: tuple[ToolResult, ...] = ()
    left_out: bool = False
    asked_at: float = field(default_factory=time.time)

    @property
    def images_to_send(self) -> tuple[str, ...]:
        return () if self.left_out else self.images


def new_id() -> str:
    """A chat's id in the URL. It is no secret: reading the chat takes the visitor's cookie too."""
    return secrets.token_urlsafe(12)


@dataclass
class Conversation:
    """One chat. `images`: by hash; their bytes are dropped once they are in the store.

    `stored`: each turn's row of the store, by the number of the turn, as it was when it was last read or written here.
    """

    id: str = field(default_factory=new_id)
    title: str = ""
    turns: list[Turn] = field(default_factory=list)
    images: dict[str, AttachedImage] = field(default_factory=dict)
    stored: dict[int, str] = field(default_factory=dict, compare=False, repr=False)

    def ask(self, question: str, images: list[AttachedImage], sample: str | None = None) -> Turn:
        """Append a turn whose answer is pending."""
        self.images.update({image.sha: image for image in images})
        turn = Turn(question, tuple(dict.fromkeys(image.sha for image in images)), sample)
        self.turns.append(turn)
        self.title = self.title or _title_of(question)
        turn.answer.sent = self._to_send()
        return turn

    def adopt(self, turn: Turn, images: dict[str, AttachedImage]) -> None:
        """Append a turn of another copy of this chat, with its images."""
        self.images.update({sha: images[sha] for sha in turn.images})
        self.turns.append(turn)

    def ask_with_results(self, results: tuple[ToolResult, ...]) -> Turn:
        """Append a turn with the results of the tools that the last answer called."""
        turn = Turn("", results=results)
        self.turns.append(turn)
        turn.answer.sent = self._to_send()
        return turn

    def ask_again(self, question: str = "") -> Turn:
        """Repeat the last question, or replace it; the answer becomes an earlier one."""
        turn = self.turns[-1]
        if question and question != turn.question:
            turn.answer.question, turn.question = turn.question, question
        if turn.answer.has_content or turn.answer.reasoning:
            turn.earlier.append(turn.answer)
        turn.answer = Answer(schema=turn.answer.schema)
        turn.answer.sent = self._to_send()
        return turn

    def turns_with_older_images(self) -> list[int]:
        """Indices of the turns whose images can be left out: all with images except the newest."""
        return [number for number, turn in enumerate(self.turns) if turn.images_to_send][:-1]

    def stop_unfinished(self, now: float) -> None:
        """Mark answers as stopped that an interrupted run left unfinished. `now`: monotonic seconds."""
        for turn in self.turns:
            turn.answer.stop(now)

    def last_sample(self) -> str | None:
        """The file name of the newest image, if that is a sample."""
        return next((turn.sample for turn in reversed(self.turns) if turn.images), None)

    def image_count(self, new: int = 0) -> int:
        """The number of images in the next request if it adds `new` ones."""
        carried = [sha for _, shas in self._exchanges(extra=True) for sha in shas]
        return len(carried) + new

    def messages(self, url_of: UrlOf) -> list[dict[str, Any]]:
        """The messages of the next request, as in OpenAI's API. Images stay in their turn; reasoning is never resent."""
        messages: list[dict[str, Any]] = []
        for turn, shas in self._exchanges():
            messages += [{"role": "tool", "tool_call_id": r.id, "content": r.text} for r in turn.results]
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": url_of(self.images[sha])}} for sha in shas
            ]
            if not turn.results:
                messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
            if turn is not self.turns[-1]:
                messages.append(self._answer_message(turn))
        return messages

    def _answer_message(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": turn.answer.text or None}
        if self._has_results(turn):
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in turn.answer.calls
            ]
        return message

    def _has_results(self, turn: Turn) -> bool:
        following = next((after for before, after in pairwise(self.turns) if before is turn), None)
        return following is not None and bool(following.results)

    def drop_bytes(self, shas: set[str]) -> None:
        """Drop the bytes of images that are now in the store."""
        self.images.update({sha: replace(self.images[sha], data=b"") for sha in shas if sha in self.images})

    def _to_send(self) -> tuple[str, ...]:
        return tuple(sha for _, shas in self._exchanges() for sha in shas)

    def _exchanges(self, extra: bool = False) -> list[tuple[Turn, tuple[str, ...]]]:
        """(turn, hashes of its images) of every turn that is sent; the last one has no answer yet.

        A turn without an answer is omitted, but its images move to the next turn: a question after a failure still
        refers to the image on the screen. `extra` appends an empty turn.
        """
        turns = [*self.turns, Turn("")] if extra else self.turns
        exchanges: list[tuple[Turn, tuple[str, ...]]] = []
        carried: tuple[str, ...] = ()
        for turn in turns:
            shas = tuple(dict.fromkeys(carried + turn.images_to_send))
            has_answer = turn.answer.text.strip() or self._has_results(turn)
            if turn is not turns[-1] and not has_answer:
                refused = turn.answer.error is not None and turn.answer.error.kind in REFUSALS
                carried = () if refused else shas
                continue
            exchanges.append((turn, shas))
            carried = ()
        return exchanges


def _title_of(question: str) -> str:
    title = " ".join(question.split())
    return title if len(title) <= TITLE_LENGTH else title[: TITLE_LENGTH - 1].rstrip() + "…"
