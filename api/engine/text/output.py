"""What one request has said so far: its text, what may or must come next, and why it ends.

Knows tokens, bytes and text; no tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items

from api.engine.request import FinishReason, Grammar, Request
from api.engine.text.detokenizer import Detokenizer
from api.engine.text.markup import THINK
from api.engine.text.tokenizer import Vocabulary

LOOK_FOR_LOOPS_EVERY = 16  # tokens
LEAST_REPEATS = 4


class GrammarViolation(Exception):
    """A token came that the grammar does not allow."""


class OutputState:
    def __init__(self, request: Request, vocabulary: Vocabulary, end_ids: frozenset[int], context_tokens: int) -> None:
        sampling = request.sampling
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._limit = min(sampling.max_tokens, context_tokens - len(request.prompt_ids))
        self._text = Detokenizer(sampling.stop, sampling.stop_skips)
        self._ids: list[int] = []
        self._forced: deque[int] = deque()
        self._thinking = Thinking(request.prompt_ids, vocabulary)
        self._before_grammar = (sampling.grammar_after or "").encode()
        self._tail = b""

    # What may come next.

    @property
    def forced(self) -> int | None:
        """The token that must come next, whatever the model says."""
        return self._forced[0] if self._forced else None

    @property
    def grammar(self) -> Grammar | None:
        """The grammar, if it holds already."""
        return None if self._before_grammar else self._sampling.grammar

    @property
    def barred_ids(self) -> frozenset[int]:
        """Tokens that must not come next: an answer may have to reach a length. A grammar knows its own end."""
        short = len(self._ids) < self._sampling.min_tokens
        return self._end_ids if short and self.grammar is None else frozenset()

    # What has come.

    def feed(self, token: int) -> tuple[str, FinishReason | None]:
        """Take one token; returns text that can no longer change, and the reason if this was the last.

        Raises GrammarViolation.
        """
        self._ids.append(token)
        ends = token in self._end_ids and not self._sampling.ignore_eos
        data = b"" if ends else self._vocabulary.token_bytes(token)
        if not ends:
            self._follow(token, data)
        text = self._text.feed(data)
        reason = self._reason(ends)
        return (text + self._text.finish() if reason else text), reason

    def _follow(self, token: int, data: bytes) -> None:
        """Keep grammar, thinking budget and forced tokens in step with what was said."""
        if self._forced:
            self._forced.popleft()
        grammar = self.grammar
        if grammar is not None and not grammar.accept(token):
            raise GrammarViolation(f"token {token} does not fit the grammar")
        if self._before_grammar:
            self._tail = (self._tail + data)[-len(self._before_grammar) - len(data) :]
            if self._before_grammar in self._tail:
                self._before_grammar = b""
        inside = self._thinking.feed(token, data)
        budget = self._sampling.thinking_tokens
        if budget is not None and inside is not None and inside >= budget and not self._forced:
            self._forced.extend(self._sampling.thinking_end_ids)

    def _reason(self, ends: bool) -> FinishReason | None:
        grammar = self.grammar
        if ends or self._text.stopped or (grammar is not None and grammar.finished()):
            return FinishReason.STOP
        if len(self._ids) >= self._limit:
            return FinishReason.LENGTH
        window = self._sampling.loop_window
        if window and len(self._ids) >= window and len(self._ids) % LOOK_FOR_LOOPS_EVERY == 0:
            period = smallest_period(self._ids[-window:])
            if period * LEAST_REPEATS <= window:
                return FinishReason.REPETITION
        return None


class Thinking:
    """Counts the tokens of the block that the model thinks in before it answers."""

    def __init__(self, prompt_ids: Items[int], vocabulary: Vocabulary) -> None:
        self._opening = vocabulary.special.get(THINK)
        self._closing = vocabulary.special.get("</think>")
        self._count = 0
        last = _last_text(prompt_ids, vocabulary)
        self._where = "before"
        if last is not None:  # the template may have opened the block, or opened and closed it
            self._where = {self._opening: "inside", self._closing: "after"}.get(last, "before")

    def feed(self, token: int, data: bytes) -> int | None:
        """Tokens inside the open block so far; None outside of it."""
        if self._where == "before" and token == self._opening:
            self._where = "inside"
            return 0
        if self._where == "before" and data.strip():
            self._where = "after"
        if self._where == "inside" and token == self._closing:
            self._where = "after"
        if self._where != "inside":
            return None
        self._count += 1
        return self._count


def _last_text(ids: Items[int], vocabulary: Vocabulary) -> int | None:
    """The last token that is not white space, back to the last token without text (a role)."""
    for token in reversed(ids):
        data = vocabulary.token_bytes(token)
        if not data:
            return None
        if data.strip():
            return token
    return None


def smallest_period(tokens: Items[int]) -> int:
    """The smallest p with tokens[i] == tokens[i + p] for all i."""
    border = [0] * len(tokens)
    for place in range(1, len(tokens)):
        length = border[place - 1]
        while length and tokens[place] != tokens[length]:
            length = border[length - 1]
        border[place] = length + (tokens[place] == tokens[length])
    return len(tokens) - (border[-1] if border else 0)
