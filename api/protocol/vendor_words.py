"""Other servers' words for what this one has, translated into the fields of `ChatRequest` before they are checked.

Sources are the APIs of Zhipu, Qwen, Mistral, OpenRouter, vLLM, SGLang, llama.cpp, text-generation-inference and the older
forms of OpenAI's. A value of the wrong type is left as it is, for the check to explain.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from api.errors import ServingError, invalid
from api.protocol.body import shown
from api.protocol.fields import IgnoredFields, asks_for_nothing, unsupported
from api.protocol.message_words import translate_messages, translate_tools

WITHOUT_LIMIT = 2**31 - 1  # tokens: as long as the context allows
# Words with the same meaning and values as a field here.
SYNONYMS = {
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "thinking_budget": "thinking_token_budget",
    "no_stop_trim": "include_stop_str_in_output",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "ebnf": "grammar",
}
# llama.cpp's samplers; here their order is fixed.
_SAMPLERS = frozenset(
    {"penalties", "dry", "top_n_sigma", "top_k", "typ_p", "typical_p", "top_p", "min_p", "xtc", "temperature"}
)


class Translation:
    """One request's fields in this server's words; `given` is the caller's word for a field, for error messages."""

    def __init__(self, data: dict[str, Any], ignored: IgnoredFields) -> None:
        self.data = data
        self.ignored = ignored
        self.given: dict[str, str] = {}

    def put(self, field: str, value: Any, word: str) -> None:
        """Set a field by another word for it. Raises the 400 error if both are given and differ."""
        present = self.data.get(field)
        if present is not None and present != value:
            raise invalid(f"`{word}`: contradicts `{self.given.get(field, field)}`.", word)
        self.data[field] = value
        self.given[field] = word

    def think(self, enabled: bool, word: str) -> None:
        options = self.data.get("chat_template_kwargs") or {}
        if not isinstance(options, dict):
            return
        if options.get("enable_thinking", enabled) not in (enabled, None):
            raise invalid(f"`{word}`: contradicts `chat_template_kwargs.enable_thinking`.", word)
        self.data["chat_template_kwargs"] = {**options, "enable_thinking": enabled}

    def schema(self, schema: Any, word: str) -> None:
        """The answer must fit a JSON schema, which may be written as a string."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise invalid(f"`{word}` must be a JSON schema. Given: {shown(schema)}", word) from None
        self.put("response_format", {"type": "json_schema", "json_schema": {"schema": schema}}, word)

    def renamed(self, error: ServingError) -> ServingError:
        """The same error in the caller's words."""
        for field, word in self.given.items():
            if error.param == field or (error.param or "").startswith((f"{field}.", f"{field}[")):
                message = error.message.replace(f"`{field}", f"`{word}", 1)
                param = word + (error.param or "")[len(field) :]
                return ServingError(error.status, message, error.type, error.code, param)
        return error


def translate(data: dict[str, Any], ignored: IgnoredFields) -> Translation:
    """Rewrites `data` in place. Raises the 400 error for words that contradict each other."""
    translation = Translation(data, ignored)
    _merge_extra_body(data)
    for word, field in SYNONYMS.items():
        if (value := data.pop(word, None)) is not None:
            translation.put(field, value, word)
    for word, settle in _WORDS.items():
        if (value := data.get(word)) is not None:
            settle(translation, value, word)
    translate_messages(data.get("messages"), ignored)
    translate_tools(data.get("tools"), ignored)
    return translation


def _merge_extra_body(data: dict[str, Any]) -> None:
    """OpenAI's client merges it itself; some others send it as it is."""
    extra = data.get("extra_body")
    if not isinstance(extra, dict) or not extra:
        return
    for name, value in data.pop("extra_body").items():
        if data.get(name) not in (None, value):
            raise invalid(f"`extra_body.{name}`: contradicts `{name}`.", f"extra_body.{name}")
        data[name] = value


def _length(to: Translation, value: Any, word: str) -> None:
    """-1: as long as the context allows. 0: as if there were none, as clients with a slider mean it."""
    if value == -1 and not isinstance(value, bool):
        to.data[word] = WITHOUT_LIMIT
    elif value == 0 and not isinstance(value, bool):
        del to.data[word]
        to.ignored.note(to.given.get(word, word))


def _lengths(to: Translation, value: Any, word: str) -> None:
    """`max_completion_tokens` replaces `max_tokens`, which OpenAI calls deprecated."""
    _length(to, value, word)
    newer, older = to.data.get("max_completion_tokens"), to.data.get("max_tokens")
    if newer is not None and older is not None and newer != older:
        del to.data["max_tokens"]
        to.ignored.note("max_tokens")


def _stop(to: Translation, value: Any, word: str) -> None:
    """Empty strings stop nothing."""
    if value == "" or value == []:
        del to.data[word]
    elif isinstance(value, list) and "" in value:
        to.data[word] = [item for item in value if item != ""]
    else:
        return
    to.ignored.note(to.given.get(word, word))


def _do_sample(to: Translation, value: Any, word: str) -> None:
    if isinstance(value, bool):
        del to.data[word]
        if not value:
            to.data["temperature"] = 0.0


def _thinking(to: Translation, value: Any, word: str) -> None:
    """Zhipu's and Anthropic's `thinking`: {type, budget_tokens}; Ollama's `think`: a boolean or an effort."""
    if isinstance(value, bool):
        to.think(value, word)
    elif isinstance(value, str):
        to.put("reasoning_effort", value, word)
    elif value == {}:
        to.ignored.note(word)
    elif isinstance(value, dict):
        kind = value.get("type")
        if kind not in ("enabled", "disabled", "adaptive", "auto"):
            raise invalid(
                f"`{word}.type` must be 'enabled', 'disabled', 'adaptive' or 'auto'. Given: {shown(kind)}",
                f"{word}.type",
            )
        if kind in ("enabled", "disabled"):
            to.think(kind == "enabled", f"{word}.type")
        if value.get("budget_tokens") is not None and kind != "disabled":
            to.put("thinking_token_budget", value["budget_tokens"], f"{word}.budget_tokens")
        for name in value.keys() - {"type", "budget_tokens"}:  # `clear_thinking`, for example, is what happens here
            to.ignored.note(f"{word}.{name}")
    else:
        raise invalid(f"`{word}` must be an object with `type`. Given: {shown(value)}", word)
    del to.data[word]


def _enable_thinking(to: Translation, value: Any, word: str) -> None:
    if not isinstance(value, bool):
        raise invalid(f"`{word}` must be true or false. Given: {shown(value)}", word)
    del to.data[word]
    to.think(value, word)


def _template_options(to: Translation, value: Any, word: str) -> None:
    """`thinking` is DeepSeek's name, in its template, of `enable_thinking`."""
    if isinstance(value, dict) and isinstance(value.get("thinking"), bool):
        to.data[word] = {name: inner for name, inner in value.items() if name != "thinking"}
        to.think(value["thinking"], f"{word}.thinking")


def _reasoning(to: Translation, value: Any, word: str) -> None:
    """OpenRouter's: {effort, max_tokens, exclude, enabled}."""
    if not isinstance(value, dict):
        raise invalid(f"`{word}` must be an object. Given: {shown(value)}", word)
    del to.data[word]
    for name, inner in value.items():
        path = f"{word}.{name}"
        if inner is None:
            to.ignored.note(path)
        elif name == "effort":
            to.put("reasoning_effort", inner, path)
        elif name == "max_tokens":
            to.put("thinking_token_budget", inner, path)
        elif name in ("exclude", "enabled"):
            if not isinstance(inner, bool):
                raise invalid(f"`{path}` must be true or false. Given: {shown(inner)}", path)
            if name == "enabled":
                to.think(inner, path)
            elif inner:
                to.put("include_reasoning", False, path)
        elif name in ("summary", "generate_summary"):  # reasoning is returned whole
            to.ignored.note(path)
        else:
            raise unsupported(path)


def _reasoning_format(to: Translation, value: Any, word: str) -> None:
    """llama.cpp's and Groq's words for where the reasoning goes."""
    separate = {"auto": True, "deepseek": True, "parsed": True, "none": False, "raw": False}
    if value == "hidden":
        to.put("include_reasoning", False, word)
    elif isinstance(value, str) and value in separate:
        to.put("separate_reasoning", separate[value], word)
    else:
        known = ", ".join(repr(name) for name in [*separate, "hidden"])
        raise invalid(f"`{word}` must be one of {known}. Given: {shown(value)}", word)
    del to.data[word]


def _prompt_mode(to: Translation, value: Any, word: str) -> None:
    if value != "reasoning":
        raise invalid(f"`{word}` must be 'reasoning'. Given: {shown(value)}", word)
    del to.data[word]
    to.think(True, word)


def _usage(to: Translation, value: Any, word: str) -> None:
    """OpenRouter's word for `stream_options.include_usage`; a whole answer has its usage anyway."""
    if not isinstance(value, dict) or not isinstance(value.get("include", False), bool):
        raise invalid(f"`{word}` must be an object with `include`. Given: {shown(value)}", word)
    del to.data[word]
    options = to.data.get("stream_options")
    if value.get("include") and to.data.get("stream") is True and isinstance(options, dict | None):
        to.data["stream_options"] = {"include_usage": True, **(options or {})}
    else:
        to.ignored.note(word, harmless=True)


def _stream_options(to: Translation, value: Any, word: str) -> None:
    if to.data.get("stream") in (None, False) and isinstance(value, dict):
        del to.data[word]
        to.ignored.note(word)


def _structured_outputs(to: Translation, value: Any, word: str) -> None:
    """vLLM's: exactly one of json, regex, choice, grammar, json_object."""
    if not isinstance(value, dict):
        raise invalid(f"`{word}` must be an object. Given: {shown(value)}", word)
    del to.data[word]
    for name, inner in value.items():
        path = f"{word}.{name}"
        if name == "json" and inner is not None:
            to.schema(inner, path)
        elif name in ("regex", "choice", "grammar") and inner is not None:
            to.put(name, inner, path)
        elif name == "json_object" and inner is True:
            to.put("response_format", {"type": "json_object"}, path)
        elif asks_for_nothing(inner):
            to.ignored.note(path)
        else:
            raise unsupported(path)


def _json_schema(to: Translation, value: Any, word: str) -> None:
    """A schema that is given at the top: vLLM's `guided_json`, SGLang's and llama.cpp's `json_schema`."""
    del to.data[word]
    to.schema(value, word)


def _response_format(to: Translation, value: Any, word: str) -> None:
    """Schemas beside `type` (llama.cpp, Together, Fireworks), or as its `value` (text-generation-inference)."""
    if not isinstance(value, dict):
        return
    kind = value.get("type")
    place = next((name for name in ("schema", "value") if value.get(name) is not None), None)
    if place is None:
        return
    rest = {name: inner for name, inner in value.items() if name not in ("type", place)}
    if kind == "regex":
        del to.data[word]
        to.put("regex", value[place], f"{word}.{place}")
    elif kind in ("json", "json_object", "json_schema") and not rest.get("json_schema"):
        to.data[word] = {"type": "json_schema", "json_schema": {**rest, "schema": value[place]}}


def _repeat_last_n(to: Translation, value: Any, word: str) -> None:
    """The penalty counts the whole context here; without a penalty the number has no effect."""
    if value == -1 or to.data.get("repetition_penalty") in (None, 1):
        del to.data[word]
        to.ignored.note(word)
    else:
        raise invalid(
            f"`{word}` must be -1, the whole context, with a penalty. Given: {shown(value)}", word, "unsupported_value"
        )


def _samplers(to: Translation, value: Any, word: str) -> None:
    names = value.split(";") if isinstance(value, str) else value
    if isinstance(names, list) and all(isinstance(name, str) and name in _SAMPLERS for name in names):
        del to.data[word]
        to.ignored.note(word)


def _word_check(to: Translation, value: Any, word: str) -> None:
    """Zhipu's check of the answer for sensitive words can only be off here."""
    if isinstance(value, dict) and value.get("status") == "DISABLE":
        del to.data[word]
        to.ignored.note(word)


def _tool_choice(to: Translation, value: Any, word: str) -> None:
    if isinstance(value, dict):
        kind, name = value.get("type"), value.get("name")
        rest = {key: inner for key, inner in value.items() if key not in ("type", "name")}
        if kind in ("auto", "none", "any", "required"):
            value = kind
        elif kind in ("function", "tool") and isinstance(name, str):
            value = {**rest, "type": "function", "function": {"name": name}}
        elif kind == "allowed_tools" and isinstance(rest.get("allowed_tools"), dict):
            value = {"type": kind, **rest["allowed_tools"]}
        if isinstance(value, dict) and isinstance(value.get("tools"), list):
            value = {**value, "tools": [_named(tool) for tool in value["tools"]]}
    to.data[word] = "required" if value == "any" else value


def _named(tool: Any) -> Any:
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        return {"type": tool.get("type", "function"), "function": {"name": tool["name"]}}
    return tool


_WORDS: dict[str, Callable[[Translation, Any, str], None]] = {
    "max_tokens": _lengths,
    "max_completion_tokens": _lengths,
    "stop": _stop,
    "do_sample": _do_sample,
    "chat_template_kwargs": _template_options,
    "thinking": _thinking,
    "think": _thinking,
    "enable_thinking": _enable_thinking,
    "reasoning": _reasoning,
    "reasoning_format": _reasoning_format,
    "prompt_mode": _prompt_mode,
    "stream_options": _stream_options,
    "usage": _usage,
    "structured_outputs": _structured_outputs,
    "guided_json": _json_schema,
    "json_schema": _json_schema,
    "response_format": _response_format,
    "repeat_last_n": _repeat_last_n,
    "samplers": _samplers,
    "sensitive_word_check": _word_check,
    "tool_choice": _tool_choice,
}
