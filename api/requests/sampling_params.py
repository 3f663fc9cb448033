"""Translates the fields of a chat request into the engine's sampling parameters, and compiles its grammar."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

from api.caller import Caller
from api.engine.loaded_model import Model
from api.engine.request import SamplingParams
from api.engine.text.bindable_schema import GrammarError
from api.engine.text.grammar import GrammarCompiler, MatcherGrammar
from api.engine.text.grammar_text import AnswerForm, CallableTool
from api.engine.text.markup import END_THINK, THINK
from api.errors import cannot_enforce, invalid
from api.protocol.schemas import ChatRequest
from api.protocol.text_completion import TextRequest
from settings import Settings

GRAMMAR_THREADS = 2
ROOM_AFTER_THOUGHT = 1024  # tokens of the longest answer that a thought leaves
COMPILE_S = 10.0  # a large schema takes one second
_SEEDS = 2**63
_POSITION_IN_GRAMMAR = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")  # of no use to a caller


def answer_form(chat: ChatRequest, starts_thinking: bool) -> AnswerForm:
    return AnswerForm(
        schema=chat.answer_schema,
        regex=chat.regex,
        choice=tuple(chat.choice or ()),
        grammar=chat.grammar,
        tools=tuple(
            CallableTool(tool.function.name, tool.function.parameters, bool(tool.function.strict))
            for tool in chat.active_tools
        ),
        must_call=chat.must_call,
        many_calls=chat.many_calls,
        may_think=chat.enable_thinking and not chat.continue_final_message,
        starts_thinking=starts_thinking,
        strict=chat.is_strict,
    )


class Grammars:
    """Compiles the grammars of requests in worker threads: one at a time for each key, so that the wide schemas of one do not
    hold those of all others, and health probes in a thread of their own."""

    def __init__(self) -> None:
        self._probe_pool = ThreadPoolExecutor(1, thread_name_prefix="probe-grammar")
        self._turns: dict[str, asyncio.Lock] = {}  # by the name of the key
        self._pool = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammar")
        self._compiler: GrammarCompiler | None = None

    async def compile(self, chat: ChatRequest, starts_thinking: bool, model: Model, caller: Caller) -> list[MatcherGrammar | None]:
        """One grammar for each choice, or None where nothing constrains the answer. Called in the event loop only.

        Raises the 400 error for a schema that cannot be enforced.
        """
        if not chat.constraints and not chat.active_tools:
            return [None] * chat.choices
        form = answer_form(chat, starts_thinking)
        if form.is_free:
            return [None] * chat.choices
        if self._compiler is None:
            self._compiler = GrammarCompiler(model.vocabulary, model.end_ids)
        param = next(iter(chat.constraints), "tools")
        pool = self._probe_pool if caller.probe else self._pool
        try:
            async with self._turns.setdefault(f"{caller.name} {caller.probe}", asyncio.Lock()):  # its own waiting is no sign of complexity
                work = asyncio.get_running_loop().run_in_executor(pool, _compile_all, self._compiler, form, chat.choices)
                return await asyncio.wait_for(work, COMPILE_S)
        except GrammarError as error:
            reason = _POSITION_IN_GRAMMAR.sub("", str(error))
            raise cannot_enforce(reason, param) from None
        except TimeoutError:
            raise invalid(
                f"`{param}` is too complex: not compiled in {COMPILE_S:g} s.", param, "schema_too_complex"
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._probe_pool.shutdown(wait=False, cancel_futures=True)


def _compile_all(compiler: GrammarCompiler, form: AnswerForm, count: int) -> list[MatcherGrammar | None]:
    return [compiler.compile(form) for _ in range(count)]


def longest_answer(chat: ChatRequest, model: Model, prompt_tokens: int, settings: Settings) -> int:
    """The largest number of tokens that the answer may have."""
    unset = settings.default_max_tokens or model.answer.of(chat.enable_thinking)
    return min(chat.requested_max_tokens or unset, model.context_tokens - prompt_tokens)


def sampling_params(
    chat: ChatRequest, model: Model, prompt_tokens: int, settings: Settings, choice: int, grammar: MatcherGrammar | None
) -> SamplingParams:
    defaults = model.defaults
    longest = longest_answer(chat, model, prompt_tokens, settings)
    thinking_tokens = None
    if chat.enable_thinking and END_THINK in model.vocabulary.special:
        thinking_tokens = chat.thinking_tokens
        if thinking_tokens is None and chat.requested_max_tokens is None:
            thinking_tokens = longest - min(longest // 4, ROOM_AFTER_THOUGHT)  # else it could end inside the thought
    loop_window = settings.loop_window if chat.loop_window is None else chat.loop_window
    if chat.loop_window is None and chat.ignore_eos:
        loop_window = 0  # a benchmark needs the full number of tokens, whatever they are
    return SamplingParams(
        max_tokens=longest,
        temperature=defaults.temperature if chat.temperature is None else chat.temperature,
        top_p=defaults.top_p if chat.top_p is None else chat.top_p,
        top_k=defaults.top_k if chat.top_k is None else max(chat.top_k, 0),
        min_p=chat.min_p or 0.0,
        repetition_penalty=chat.repetition_penalty or defaults.repetition_penalty,
        presence_penalty=chat.presence_penalty or 0.0,
        frequency_penalty=chat.frequency_penalty or 0.0,
        logit_bias=tuple((int(token), bias) for token, bias in (chat.logit_bias or {}).items()),
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        # Choices with one seed must differ from each other, and be reproducible.
        seed=None if chat.seed is None else (chat.seed + choice + _SEEDS) % (2 * _SEEDS) - _SEEDS,
        stop=chat.stop_strings,
        include_stop=bool(chat.include_stop_str_in_output),
        stop_token_ids=frozenset(chat.stop_token_ids or ()),
        stop_skips=None if isinstance(chat, TextRequest) else (THINK, END_THINK),
        min_tokens=chat.min_tokens or 0,
        ignore_eos=bool(chat.ignore_eos),
        grammar=grammar,
        thinking_tokens=thinking_tokens,
        thinking_end_ids=(model.vocabulary.special[END_THINK],) if thinking_tokens is not None else (),
        loop_window=loop_window,
    )


def check_tokens(chat: ChatRequest, model: Model) -> None:
    """Raises the 400 error for a token that the model does not have."""
    for name, tokens in (("stop_token_ids", chat.stop_token_ids or []), ("logit_bias", map(int, chat.logit_bias or {}))):
        for token in tokens:
            if not 0 <= token < 2**31 or not model.vocabulary.has(token):
                raise invalid(f"`{name}`: the model has no token {token}.", name)
