"""Grammars that constrain an answer token by token, compiled by llguidance for a model's vocabulary.

Owns the compiler and the matcher of one answer; `grammar_text` writes the grammar.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from api.engine.text.bindable_schema import GrammarError
from api.engine.text.grammar_text import AnswerForm, write
from api.engine.text.markup import CALL, END_THINK
from api.engine.text.tokenizer import Vocabulary

# Limits of one grammar; beyond them compiling fails.
_LIMITS = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)
MAX_GRAMMAR_CHARACTERS = 200_000
JSON_STARTS = tuple('{["-0123456789tfn')
DEAD_END = "no text can satisfy the schema from here on"  # llguidance's NoExtensionBias


class GrammarCompiler:
    """Thread-safe. The token table is built on first use, which takes a second for a large vocabulary."""

    def __init__(self, vocabulary: Vocabulary, end_ids: Iterable[int]) -> None:
        self._vocabulary = vocabulary
        self._end_ids = sorted(end_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compile(self, form: AnswerForm) -> MatcherGrammar:
        """What cannot be bound is left free where the form allows it: see `MatcherGrammar.relaxed`.

        Raises GrammarError. Releases the GIL while it compiles.
        """
        try:
            return self._compile(form, relaxed=False)
        except GrammarError:
            if not form.can_be_relaxed:
                raise
            return self._compile(form, relaxed=True)

    def _compile(self, form: AnswerForm, relaxed: bool) -> MatcherGrammar:
        text = write(form, self._vocabulary.special, relaxed)
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise GrammarError(f"it must have <= {MAX_GRAMMAR_CHARACTERS} characters as a grammar. Given: {len(text)}")
        matcher = LLMatcher(self._table(), text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(_first_line(matcher))
        self._check_start(matcher, form)
        return MatcherGrammar(matcher, relaxed)

    def _check_start(self, matcher: LLMatcher, form: AnswerForm) -> None:
        """Raises GrammarError if no answer can begin, or if its beginning is past the parser's limits.

        The limits on what may come next are checked by a step only, not by compiling. A schema that exceeds them later in
        the answer is not found here.
        """
        head = [self._vocabulary.special[END_THINK]] if form.starts_thinking else []
        if form.schema is not None and not form.must_call:
            starts = [_takes(matcher, [*head, *self._vocabulary.encode(text)]) for text in JSON_STARTS]
            if not any(starts):
                raise GrammarError(DEAD_END)
        for tool in form.tools:
            _takes(matcher, [*head, *self._vocabulary.encode(f"{CALL}{tool.name}\n")])

    def _table(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                definition = json.loads(self._vocabulary.definition())
                # Special tokens do not match text, so that no string can contain a markup token.
                for token in definition["added_tokens"]:
                    token["special"] = True
                self._tokenizer = LLTokenizer(json.dumps(definition), eos_token=self._end_ids)
            return self._tokenizer


class MatcherGrammar:
    """The `Grammar` of one answer. `failed` is the error that stopped it, or an empty string.

    `relaxed`: it allows more than the schema, so that the finished answer is to be checked.
    """

    def __init__(self, matcher: LLMatcher, relaxed: bool = False) -> None:
        self._matcher = matcher
        self.relaxed = relaxed

    def allowed(self) -> np.ndarray:
        """int32[ceil(vocabulary / 32)]: one bit for each token that is allowed next, lowest bit first.

        Only end tokens are allowed once the answer is complete or the grammar has failed.
        """
        return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)

    def forced(self) -> list[int]:
        return self._matcher.compute_ff_tokens()

    def accept(self, token: int) -> bool:
        return self._matcher.consume_token(token)

    def finished(self) -> bool:
        return self._matcher.is_stopped()

    @property
    def failed(self) -> str:
        return _first_line(self._matcher)


def _takes(matcher: LLMatcher, tokens: list[int]) -> bool:
    """Whether an answer may begin with `tokens`. Raises GrammarError if the parser fails on them."""
    trial = matcher.deep_copy()
    taken = trial.try_consume_tokens(tokens)
    if trial.is_error():
        raise GrammarError(_first_line(trial))
    return taken == len(tokens)


def _first_line(matcher: LLMatcher) -> str:
    """The matcher's error for a caller; empty without one."""
    error = matcher.get_error().strip()
    return DEAD_END if error.startswith("NoExtensionBias") else error.partition("\n")[0][:300]
