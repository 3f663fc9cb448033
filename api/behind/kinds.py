"""The kinds of engines that may stand behind this API, and which fields of a request each of them honours.

A field that the engine would drop in silence is refused by its name instead, as every field is that has no effect here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from api.errors import invalid
from api.protocol.schemas import EFFORT_TOKENS, ChatRequest
from api.protocol.text_completion import TextRequest

Kind = Literal["vllm", "sglang", "llama.cpp", "glm", "other"]
NAMES: Mapping[Kind, str] = {
    "vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp", "glm": "another GLM-4.6V-Flash-WEB",
    "other": "of an unknown kind",
}  # fmt: skip
# `owned_by` of GET /v1/models.
OWNERS: Mapping[str, Kind] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}


@dataclass(frozen=True)
class Traits:
    """How an engine is asked, beyond its fields."""

    counts_as_it_writes: bool = False  # knows `stream_options.continuous_usage_stats`
    opens_at_once: bool = False  # the first event of a stream comes before the first token, with the tokens of the prompt
    tokenize: str = ""  # path of its tokenizer; empty: it has none
    metrics: bool = True  # GET /metrics, where the operator has not switched it off


TRAITS: Mapping[Kind, Traits] = {
    "vllm": Traits(counts_as_it_writes=True, tokenize="/tokenize"),
    "sglang": Traits(counts_as_it_writes=True, tokenize="/tokenize"),
    "llama.cpp": Traits(tokenize="/tokenize"),
    "glm": Traits(counts_as_it_writes=True, opens_at_once=True, tokenize="/tokenize"),
    "other": Traits(metrics=False),
}

_OPENAI = ("vllm", "sglang", "llama.cpp", "glm", "other")
_KNOWN = ("vllm", "sglang", "llama.cpp", "glm")


def _same(name: str, *kinds: str) -> dict[str, str]:
    return dict.fromkeys(kinds, name)


# The word of each kind for a field of ours. A kind that is missing does not honour it.
WORDS: Mapping[str, Mapping[str, str]] = {
    "temperature": _same("temperature", *_OPENAI),
    "top_p": _same("top_p", *_OPENAI),
    "presence_penalty": _same("presence_penalty", *_OPENAI),
    "frequency_penalty": _same("frequency_penalty", *_OPENAI),
    "stop": _same("stop", *_OPENAI),
    "logprobs": _same("logprobs", *_OPENAI),
    "top_logprobs": _same("top_logprobs", *_OPENAI),
    "logit_bias": _same("logit_bias", *_OPENAI),
    "response_format": _same("response_format", *_OPENAI),
    "seed": _same("seed", *_OPENAI),
    "top_k": _same("top_k", *_KNOWN),
    "min_p": _same("min_p", *_KNOWN),
    "repetition_penalty": {**_same("repetition_penalty", "vllm", "sglang", "glm"), "llama.cpp": "repeat_penalty"},
    "min_tokens": _same("min_tokens", "vllm", "sglang", "glm"),
    "stop_token_ids": _same("stop_token_ids", "vllm", "sglang", "glm"),
    "include_stop_str_in_output": {**_same("include_stop_str_in_output", "vllm", "glm"), "sglang": "no_stop_trim"},
    "ignore_eos": _same("ignore_eos", *_KNOWN),
    "loop_window": _same("loop_window", "glm"),
    "regex": _same("regex", "vllm", "sglang", "glm"),
    "choice": _same("choice", "vllm", "glm"),
    "grammar": _same("grammar", "glm"),  # the others read other languages
    "thinking_token_budget": _same("thinking_token_budget", "vllm", "glm"),
    # An unknown engine may refuse it by name; whether to think is a default of some wires, not only a wish of callers.
    "chat_template_kwargs": _same("chat_template_kwargs", *_OPENAI),
    "continue_final_message": _same("continue_final_message", *_KNOWN),
    "cache_salt": _same("cache_salt", "vllm", "sglang", "glm"),
    "verbosity": _same("verbosity", "glm"),
}
# Fields that are honoured here, whatever the engine does.
HERE = frozenset(
    {"messages", "model", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "skip_special_tokens", "tools",
     "tool_choice", "parallel_tool_calls", "functions", "function_call", "add_generation_prompt", "request_id", "reasoning_effort", "include_reasoning",
     "separate_reasoning", "prompts", "echo"}
)  # fmt: skip
_IN_STRUCTURED_OUTPUTS = ("regex", "choice")  # vLLM has them in an object of their own


def sampling_fields(chat: ChatRequest, kind: Kind) -> dict[str, Any]:
    """The fields of `chat` that change how an answer is written, in the words of `kind`.

    Raises the 400 error that names a field which this kind does not honour.
    """
    fields: dict[str, Any] = {}
    for name in sorted(chat.model_fields_set - HERE):
        value = getattr(chat, name)
        if value is None:
            continue
        if kind not in WORDS[name]:
            if not value:  # zero or false: what holds anyway
                continue
            raise _not_honoured(name, kind)
        dumped = chat.model_dump(include={name}, exclude_none=True, by_alias=True)[name]
        fields[WORDS[name][kind]] = dumped
    _set_thinking(chat, kind, fields)
    if kind == "llama.cpp":  # goes on with a last message of the assistant by itself
        fields.pop("continue_final_message", None)
    elif fields.get("continue_final_message"):
        fields["add_generation_prompt"] = False
    else:
        fields.pop("continue_final_message", None)
    if kind == "vllm":
        structured = {name: fields.pop(name) for name in _IN_STRUCTURED_OUTPUTS if name in fields}
        if structured:
            fields["structured_outputs"] = structured
    return fields


def _set_thinking(chat: ChatRequest, kind: Kind, fields: dict[str, Any]) -> None:
    """`reasoning_effort` in terms that the engines know: thinking at all, and for how many tokens."""
    if chat.reasoning_effort is None or isinstance(chat, TextRequest):
        return
    longest = EFFORT_TOKENS.get(chat.reasoning_effort)
    if chat.reasoning_effort == "none":
        fields["chat_template_kwargs"] = {"enable_thinking": False}
    elif longest is not None and chat.thinking_token_budget is None:
        if kind not in WORDS["thinking_token_budget"]:
            raise _not_honoured("reasoning_effort", kind)
        fields["thinking_token_budget"] = longest


def _not_honoured(name: str, kind: Kind) -> Exception:
    return invalid(f"`{name}` is not honoured by the engine behind ({NAMES[kind]}).", name, "unsupported_parameter")
