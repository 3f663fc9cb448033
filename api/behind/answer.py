"""Reads the answer of the engine behind: its events become those of an engine's sequence, its choice one of this API.

An engine may have separated thoughts and calls already, or not at all: what it has is taken, and the rest of its text is
read here as our own engine's is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from api.behind.engine_client import cut_off
from api.engine.request import Delta, Done, Failed, Failure, FinishReason
from api.errors import ServingError
from api.parsing.output import Call, OutputParser, Piece
from api.protocol.completion import Choice

REASONS = {
    "stop": FinishReason.STOP, "tool_calls": FinishReason.STOP, "function_call": FinishReason.STOP,
    "content_filter": FinishReason.STOP, "length": FinishReason.LENGTH, "repetition": FinishReason.REPETITION,
}  # fmt: skip


@dataclass(frozen=True)
class EngineDelta(Delta):
    """New text of an engine behind. `entries`: log probabilities in OpenAI's form."""

    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    entries: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class EngineDone(Done):
    """`reasoning_tokens` None: the engine does not say. `unmet`: what the answer does not fit of its schema, by another API."""

    image_tokens: int = 0
    reasoning_tokens: int | None = None
    unmet: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineFailed(Failed):
    error: ServingError


def failed_with(error: ServingError) -> EngineFailed:
    return EngineFailed(Failure.ENGINE, error.message, error)


@dataclass
class EngineChoice(Choice):
    """A choice whose text an engine behind has written, perhaps with its thoughts and calls separated."""

    def _pieces(self, delta: Delta) -> list[Piece]:
        if not isinstance(delta, EngineDelta):
            return super()._pieces(delta)
        thoughts: list[Piece] = []
        if delta.reasoning and isinstance(self.parser, OutputParser):
            thoughts = self.parser.feed_reasoning(delta.reasoning)
        return [*thoughts, *super()._pieces(delta), *delta.calls]

    def _is_thought(self, delta: Delta, was_thinking: bool) -> bool:
        return super()._is_thought(delta, was_thinking) or (isinstance(delta, EngineDelta) and bool(delta.reasoning))

    def _entries(self, delta: Delta) -> list[dict[str, Any]]:
        return list(delta.entries) if isinstance(delta, EngineDelta) else super()._entries(delta)


class AnswerReader:
    """Reads the events of one choice. `on_prompt` is called with the number of the prompt's tokens once it is known."""

    def __init__(self, many_calls: bool, on_prompt: Callable[[int], None]) -> None:
        self._many_calls = many_calls
        self._on_prompt = on_prompt
        self._sent_at = time.monotonic()
        self._first_at: float | None = None
        self._last_at = self._sent_at
        self._calls: dict[int, list[str]] = {}  # name and arguments of those that are not complete
        self._halves: dict[str, str] = {}  # of a field: the first half of a character, whose second comes with the next event
        self._emitted = 0
        self._reason: str | None = None
        self._stop_string: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}
        self._unmet: tuple[str, ...] = ()
        self.tokens = 0  # so far

    def read(self, event: Mapping[str, Any]) -> EngineDelta | None:
        """What one event adds to the answer. Raises ServingError for what is no event of an answer."""
        usage = event.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
            self._on_prompt(_count(usage.get("prompt_tokens")))
        if isinstance(event.get("timings"), dict):
            self._timings = event["timings"]
        if isinstance(event.get("unmet"), list):
            self._unmet = tuple(map(str, event["unmet"]))
        choices = event.get("choices")
        # One choice is asked for in each question.
        choice = next((one for one in choices if isinstance(one, dict) and not one.get("index")), None) if isinstance(choices, list) else None
        if choice is None:
            return None
        delta = choice.get("delta")
        if delta is None:
            delta = {"content": choice.get("text")}
        if not isinstance(delta, dict):
            raise cut_off("a delta is no object")
        text = self._whole("content", delta.get("content"))
        reasoning = self._whole("reasoning_content", delta.get("reasoning_content")) or self._whole("reasoning", delta.get("reasoning"))
        calls = self._read_calls(delta.get("tool_calls"))
        entries = _entries(choice.get("logprobs"))
        if choice.get("finish_reason"):
            self._reason = str(choice["finish_reason"])
            stop = choice.get("stop_reason", choice.get("matched_stop"))
            self._stop_string = stop if isinstance(stop, str) else None
            calls += self._complete_calls()
            if self._halves.pop("content", ""):
                text += "\ufffd"
        tokens = self._new_tokens(bool(text or reasoning or delta.get("tool_calls")), len(entries))
        if not (text or reasoning or calls or entries or tokens):
            return None
        self._last_at = time.monotonic()
        if self._first_at is None:
            self._first_at = self._last_at
        return EngineDelta(text, tokens, (), reasoning, tuple(calls), tuple(entries))

    def done(self) -> EngineDone:
        """The end of the answer. Raises the error of an answer that has none."""
        if self._reason is None:
            raise cut_off("its stream has no end of the answer")
        if self._reason not in REASONS:
            raise cut_off(f"it ended it with {self._reason[:40]!r}")
        first_at = self._first_at or self._last_at
        prompt = self._usage.get("prompt_tokens_details") or {}
        written = self._usage.get("completion_tokens_details") or {}
        told = self._timings if "prefill_s" in self._timings else {}
        reasoning = written.get("reasoning_tokens") if isinstance(written, dict) else None
        return EngineDone(
            REASONS[self._reason],
            _count(self._usage.get("prompt_tokens")),
            _count(self._usage.get("completion_tokens")) or self.tokens,
            _seconds(told.get("queue_s"), 0.0),
            _seconds(told.get("prefill_s"), first_at - self._sent_at),
            _seconds(told.get("decode_s"), self._last_at - first_at),
            _count(prompt.get("cached_tokens")) if isinstance(prompt, dict) else 0,
            _seconds(told.get("vision_s"), 0.0),
            self._stop_string,
            _count(prompt.get("image_tokens")) if isinstance(prompt, dict) else 0,
            reasoning if isinstance(reasoning, int) else None,
            self._unmet,
        )

    def _whole(self, name: str, value: Any) -> str:
        """The text of a field, up to a character of which only the first half (a UTF-16 surrogate) has come."""
        if value is None:
            return ""
        if not isinstance(value, str):
            raise cut_off(f"{name} is no text")
        text = self._halves.pop(name, "") + value
        if text and "\ud800" <= text[-1] <= "\udbff":
            self._halves[name], text = text[-1], text[:-1]
        return _joined(text)

    def _new_tokens(self, wrote: bool, entries: int) -> int:
        """By the engine's count where it counts as it writes; otherwise one for each event with text."""
        counted = self._usage.get("completion_tokens")
        new = max(0, counted - self.tokens) if isinstance(counted, int) else entries or int(wrote)
        self.tokens += new
        return new

    def _read_calls(self, given: Any) -> list[Call]:
        """A call is complete once the next one begins, or the answer ends."""
        complete: list[Call] = []
        for part in given if isinstance(given, list) else []:
            index = part.get("index") or 0
            if index not in self._calls:
                complete += self._complete_calls()
                self._calls[index] = ["", ""]
            function = part.get("function") or {}
            self._calls[index][0] += _text(function.get("name"))
            arguments = function.get("arguments")
            self._calls[index][1] += json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else _text(arguments)
        return complete

    def _complete_calls(self) -> list[Call]:
        complete = [Call(_joined(name), _joined(arguments) or "{}") for name, arguments in self._calls.values() if name]
        self._calls = {}
        if not self._many_calls:
            complete = complete[: max(0, 1 - self._emitted)]
        self._emitted += len(complete)
        return complete


def _entries(logprobs: Any) -> list[dict[str, Any]]:
    """Log probabilities in the form of a chat; a text completion has them in columns."""
    if not isinstance(logprobs, dict):
        return []
    if isinstance(logprobs.get("content"), list):
        return [_entry(one) for one in logprobs["content"]]
    columns = (logprobs.get("tokens") or [], logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or [])
    entries = []
    for number, token in enumerate(columns[0]):
        top = columns[2][number] if number < len(columns[2]) and isinstance(columns[2][number], dict) else {}
        listed = [{"token": word, "logprob": value} for word, value in top.items()]
        entries.append(_entry({"token": token, "logprob": columns[1][number] if number < len(columns[1]) else None, "top_logprobs": listed}))
    return entries


def _entry(given: Mapping[str, Any]) -> dict[str, Any]:
    top = [_of_token(one) for one in given.get("top_logprobs") or []]
    return {**_of_token(given), "top_logprobs": top}


def _of_token(given: Mapping[str, Any]) -> dict[str, Any]:
    token, logprob = _joined(_text(given.get("token"))), given.get("logprob")
    data = given.get("bytes")
    return {
        "token": token,
        "logprob": max(float(logprob), -9999.0) if isinstance(logprob, int | float) else -9999.0,
        "bytes": data if isinstance(data, list) else list(token.encode()),
    }


def _joined(text: str) -> str:
    """With the halves of characters put together; one that is alone becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _seconds(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise
