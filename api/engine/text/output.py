"""The output of one sequence so far: its text, which tokens may or must come next, and why it ends.

Knows tokens, bytes and text; no tensors.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence as Items
from typing import Literal

from api.engine.request import FinishReason, Grammar, Request
from api.engine.text.markup import END_THINK, THINK
from api.engine.text.tokenizer import Vocabulary

REPETITION_CHECK_TOKENS = 16  # interval between two checks
MIN_REPEATS = 4


class GrammarViolation(Exception):
    """The grammar takes no token, or not the sampled one: it is past its limits, for example."""


class OutputState:
    """One for each sequence. Used by the engine thread only, after `submit` has created it."""

    def __init__(self, request: Request, vocabulary: Vocabulary, end_ids: frozenset[int], context_tokens: int) -> None:
        sampling = request.sampling
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._max_tokens = min(sampling.max_tokens, context_tokens - len(request.prompt_ids))
        self._detokenizer = Detokenizer(sampling.stop, sampling.stop_skips, sampling.include_stop)
        self._ids: list[int] = []
        self._forced: deque[int] = deque()
        self._thinking = ThinkingCounter(request.prompt_ids, vocabulary)
        self._grammar_trigger = (sampling.grammar_after or "").encode()  # empty once it has been seen
        self._tail = b""  # enough bytes of the output to find the trigger across tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the output."""
        return self._detokenizer.stop_string

    # Constraints on the next token.

    @property
    def forced(self) -> int | None:
        """The token that comes next whatever the logits are."""
        return self._forced[0] if self._forced else None

    @property
    def grammar(self) -> Grammar | None:
        """The grammar, if it applies already."""
        return None if self._grammar_trigger else self._sampling.grammar

    @property
    def barred_ids(self) -> frozenset[int]:
        """Tokens that must not come next: end tokens before `min_tokens`. A grammar decides about its own end."""
        short = len(self._ids) < self._sampling.min_tokens
        return self._end_ids | self._sampling.stop_token_ids if short and self.grammar is None else frozenset()

    def forced_by_grammar(self) -> list[int]:
        """Tokens that the grammar leaves no choice about. None if each needs its log probability."""
        grammar = self.grammar
        if grammar is None or self._forced or self._sampling.logprobs is not None or grammar.finished():
            return []
        return grammar.forced()

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return self._max_tokens - len(self._ids)

    # The next token.

    def feed(self, token: int) -> tuple[str, FinishReason | None]:
        """Append one token; returns text that can no longer change, and the finish reason if this was the last token.

        Raises GrammarViolation.
        """
        self._ids.append(token)
        ends = (token in self._end_ids and not self._sampling.ignore_eos) or token in self._sampling.stop_token_ids
        data = b"" if ends else self._vocabulary.token_bytes(token)
        if not ends:
            self._update_constraints(token, data)
        text = self._detokenizer.feed(data)
        reason = self._finish_reason(ends)
        return (text + self._detokenizer.finish() if reason else text), reason

    def _update_constraints(self, token: int, data: bytes) -> None:
        if self._forced:
            self._forced.popleft()
        grammar = self.grammar
        if grammar is not None and not grammar.accept(token):
            raise GrammarViolation(grammar.failed or f"token {token} does not fit the grammar")
        if self._grammar_trigger:
            self._tail = (self._tail + data)[-len(self._grammar_trigger) - len(data) :]
            if self._grammar_trigger in self._tail:
                self._grammar_trigger = b""
        thinking_tokens = self._thinking.feed(token, data)
        budget = self._sampling.thinking_tokens
        if budget is not None and thinking_tokens is not None and thinking_tokens >= budget and not self._forced:
            self._forced.extend(self._sampling.thinking_end_ids)

    def _finish_reason(self, ends: bool) -> FinishReason | None:
        grammar = self.grammar
        if ends or self._detokenizer.stopped or (grammar is not None and grammar.finished()):
            return FinishReason.STOP
        if len(self._ids) >= self._max_tokens:
            return FinishReason.LENGTH
        window = self._sampling.loop_window
        if window and len(self._ids) >= window and len(self._ids) % REPETITION_CHECK_TOKENS == 0:
            period = smallest_period(self._ids[-window:])
            if period * MIN_REPEATS <= window:
                return FinishReason.REPETITION
        return None


class ThinkingCounter:
    """Counts the tokens of the thinking block that may open an output."""

    def __init__(self, prompt_ids: Items[int], vocabulary: Vocabulary) -> None:
        self._opening = vocabulary.special.get(THINK)
        self._closing = vocabulary.special.get(END_THINK)
        self._count = 0
        self._state: Literal["before", "inside", "after"] = "before"
        last = _last_text_token(prompt_ids, vocabulary)
        if last is not None:  # the template may have opened the block, or opened and closed it
            self._state = "inside" if last == self._opening else "after" if last == self._closing else "before"

    def feed(self, token: int, data: bytes) -> int | None:
        """Tokens inside the open block so far; None outside of it."""
        if self._state == "before" and token == self._opening:
            self._state = "inside"
            return 0
        if self._state == "before" and data.strip():
            self._state = "after"
        if self._state == "inside" and token == self._closing:
            self._state = "after"
        if self._state != "inside":
            return None
        self._count += 1
        return self._count


def _last_text_token(ids: Items[int], vocabulary: Vocabulary) -> int | None:
    """The last token that is not white space, searched back to the last token without text (a role)."""
    for token in reversed(ids):
        data = vocabulary.token_bytes(token)
        if not data:
            return None
        if data.strip():
            return token
    return None


def smallest_period(tokens: Items[int]) -> int:
    """The smallest p with tokens[i] == tokens[i + p] for all i (Knuth, Morris and Pratt's failure function)."""
    border = [0] * len(tokens)
    for index in range(1, len(tokens)):
        length = border[index - 1]
        while length and tokens[index] != tokens[length]:
            length = border[length - 1]
        border[index] = length + (tokens[index] == tokens[length])
    return len(tokens) - (border[-1] if border else 0)


class Detokenizer:
    """Turns the bytes of one token after another into text; text is emitted as soon as it can no longer change.

    Not `tokenizers.decoders.DecodeStream` (0.23): it cannot be flushed, so a character that is incomplete at the end is
    lost; it holds back a U+FFFD that is the model's own, and malformed bytes, until valid text follows; and it skips
    GLM's box tokens with the other special tokens. It takes 1.0 us a token, this 2.4 us (demo tokenizer).
    """

    def __init__(self, stop: Items[str] = (), skips: tuple[str, str] | None = None, include_stop: bool = False) -> None:
        # Malformed bytes become U+FFFD only when they can no longer be completed.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopStrings(stop, skips, include_stop)

    @property
    def stopped(self) -> bool:
        return self._stops.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.found

    def feed(self, data: bytes) -> str:
        return self._stops.feed(self._decoder.decode(data))

    def finish(self) -> str:
        """The text held back, once the last token has been fed."""
        return self._stops.feed(self._decoder.decode(b"", final=True)) + self._stops.finish()


class StopStrings:
    """Passes text through up to the first stop string, which is left out unless `include_stop`, and is then in `found`.

    With `skips` (an opening and a closing tag) stop strings are not searched in the white space before the answer, nor in
    a leading block between those tags: thinking must not be cut off by a stop string that is meant for the answer.
    """

    def __init__(self, stop: Items[str], skips: tuple[str, str] | None = None, include_stop: bool = False) -> None:
        self.found: str | None = None
        self._include_stop = include_stop
        self._stop = tuple(stop)
        self._skips = skips
        self._pending = ""
        self._state: Literal["before", "inside", "answer"] = "before" if skips else "answer"

    def feed(self, text: str) -> str:
        if self.found is not None:
            return ""
        if not self._stop:
            return text
        self._pending += text
        out = ""
        while (piece := self._advance()) is not None:
            out += piece
        return out

    def finish(self) -> str:
        rest, self._pending = self._pending, ""
        return "" if self.found is not None else rest

    def _advance(self) -> str | None:
        """One transition of the automaton: text to emit, or None when more input is needed."""
        if self._state == "before":
            return self._before_answer()
        if self._state == "inside":
            return self._inside_block()
        return self._in_answer()

    def _before_answer(self) -> str | None:
        bare = self._pending.lstrip()
        if not bare:
            return None
        opening = self._skips[0] if self._skips else ""
        if opening and bare.startswith(opening):
            self._state = "inside"
            return self._emit(len(self._pending) - len(bare) + len(opening))
        if opening and opening.startswith(bare):
            return None
        self._state = "answer"
        return self._emit(len(self._pending) - len(bare))

    def _inside_block(self) -> str | None:
        assert self._skips is not None
        closing = self._skips[1]
        end = self._pending.find(closing)
        if end >= 0:
            self._state, self._skips = "before", None
            return self._emit(end + len(closing))
        free = len(self._pending) - held_back(self._pending, (closing,))
        return self._emit(free) if free else None

    def _in_answer(self) -> str | None:
        # The stop string that ends first wins, as if characters came one by one.
        hits = [(start + len(stop), start, stop) for stop in self._stop if (start := self._pending.find(stop)) >= 0]
        if hits:
            end, start, self.found = min(hits)
            out = self._pending[: end if self._include_stop else start]
            self._pending = ""
            return out or None
        free = len(self._pending) - held_back(self._pending, self._stop)
        return self._emit(free) if free else None

    def _emit(self, count: int) -> str:
        out, self._pending = self._pending[:count], self._pending[count:]
        return out


def held_back(text: str, tags: Items[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `tags`."""
    longest = max(map(len, tags), default=0) - 1
    end = text[-longest:] if longest > 0 else ""
    for tag in tags:
        if tag[:1] in end:
            break
    else:  # nearly always, and this is done for every token
        return 0
    for size in range(len(end), 0, -1):
        tail = end[-size:]
        if any(tag.startswith(tail) for tag in tags):
            return size
    return 0
