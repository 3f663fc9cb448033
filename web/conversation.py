"""What was asked and answered in one chat, and what of it is sent with the next question.

Owns turns, the pictures they brought and the rule of what is resent. Knows nothing of Streamlit or HTTP.
A turn is changed in place while its answer arrives: whatever interrupts the page, what had come stays.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from web.client import ApiError
from web.events import Box, Event, Finished, Loading, Queued, Text, Thought
from web.pictures import Picture

State = Literal["waiting", "thinking", "writing", "done", "stopped", "failed"]
UNFINISHED: tuple[State, ...] = ("waiting", "thinking", "writing")
# After these the same pictures would fail again, so they are not carried into the next question.
REFUSALS = ("refused", "too_large", "too_long")


@dataclass
class Answer:
    """One answer. `sent` lists the pictures of the request, in order: boxes count from its first."""

    state: State = "waiting"
    text: str = ""
    reasoning: str = ""
    boxes: list[Box] = field(default_factory=list)
    sent: tuple[str, ...] = ()
    queue_position: int | None = None
    loading: bool = False
    loading_progress: float | None = None
    begun: float = field(default_factory=time.monotonic)
    thinking_began: float | None = None
    thinking_s: float | None = None
    finish: Finished | None = None
    error: ApiError | None = None

    @property
    def unfinished(self) -> bool:
        return self.state in UNFINISHED

    def take(self, event: Event, now: float) -> None:
        if not self.unfinished:
            return  # stopped in another thread; what still trickles in is no longer wanted
        self.loading = isinstance(event, Loading)
        match event:
            case Queued(position):
                self.queue_position = position
            case Loading(progress):
                self.loading_progress = progress
            case Thought(text):
                self.state = "thinking"
                self.thinking_began = self.thinking_began or now
                self.reasoning += text
            case Text(text):
                self._end_thinking(now)
                self.state = "writing"
                self.text += text
            case Box():
                self.boxes.append(event)
            case Finished():
                self._end_thinking(now)
                self.state = "done"
                self.finish = event

    def fail(self, error: ApiError, now: float) -> None:
        self._end_thinking(now)
        self.state = "failed"
        self.error = error

    def stop(self, now: float) -> None:
        if self.unfinished:
            self._end_thinking(now)
            self.state = "stopped"

    def _end_thinking(self, now: float) -> None:
        if self.thinking_began is not None and self.thinking_s is None:
            self.thinking_s = now - self.thinking_began


@dataclass
class Turn:
    """A question, the pictures that it brought, and its answer. `sample` names the sample picture it came with."""

    question: str
    pictures: tuple[str, ...] = ()
    sample: str | None = None
    answer: Answer = field(default_factory=Answer)


@dataclass
class Conversation:
    turns: list[Turn] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)

    def ask(self, question: str, pictures: list[Picture], sample: str | None = None) -> Turn:
        """Add a turn whose answer is still to come."""
        self.pictures.update({picture.sha: picture for picture in pictures})
        turn = Turn(question, tuple(dict.fromkeys(picture.sha for picture in pictures)), sample)
        self.turns.append(turn)
        turn.answer.sent = tuple(sha for _, shas, _ in self._exchanges() for sha in shas)
        return turn

    def settle(self, now: float) -> None:
        """Mark what an interrupted run left unfinished as stopped."""
        for turn in self.turns:
            turn.answer.stop(now)

    def take_back_last(self) -> tuple[str, list[Picture], str | None]:
        """Remove the last turn and return what it asked, to ask it again."""
        turn = self.turns.pop()
        return turn.question, [self.pictures[sha] for sha in turn.pictures], turn.sample

    def last_sample(self) -> str | None:
        """The sample picture that the talk is about, if its newest picture is one."""
        return next((turn.sample for turn in reversed(self.turns) if turn.pictures), None)

    def picture_count(self, new: int = 0) -> int:
        """How many pictures the next request would carry with `new` more."""
        carried = [sha for _, shas, _ in self._exchanges(extra=True) for sha in shas]
        return len(carried) + new

    def messages(self) -> list[dict[str, Any]]:
        """The chat for the API. Pictures stay in the turn that brought them; reasoning is never sent back."""
        messages: list[dict[str, Any]] = []
        for question, shas, answer in self._exchanges():
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": self.pictures[sha].data_url}} for sha in shas
            ]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            if answer:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def _exchanges(self, extra: bool = False) -> list[tuple[str, tuple[str, ...], str]]:
        """(question, pictures, answer) of every turn that counts; the last one's answer is still empty.

        A turn without an answer is left out, but its pictures move to the next one: whoever asks again after
        a failure still means the picture that is on the screen. `extra` appends an empty turn to come.
        """
        turns = [*self.turns, Turn("")] if extra else self.turns
        exchanges: list[tuple[str, tuple[str, ...], str]] = []
        carried: tuple[str, ...] = ()
        for turn in turns:
            shas = tuple(dict.fromkeys(carried + turn.pictures))
            if turn is not turns[-1] and not turn.answer.text.strip():
                refused = turn.answer.error is not None and turn.answer.error.kind in REFUSALS
                carried = () if refused else shas
                continue
            exchanges.append((turn.question, shas, turn.answer.text if turn is not turns[-1] else ""))
            carried = ()
        return exchanges
