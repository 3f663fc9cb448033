"""Writes the table of fields in docs/api.md from the request's schema: `python tests/api/field_table.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from api.protocol.schemas import (
    CHANGES_THE_ANSWER,
    EFFORT_TOKENS,
    HARMLESS,
    HINTS,
    MAX_BIASES,
    MAX_STOP,
    WITHOUT_EFFECT,
    ChatRequest,
)
from api.protocol.vendor_words import SYNONYMS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
_TABLE = re.compile(r"(<!-- fields: .*? -->\n).*?(<!-- end of fields -->)", re.DOTALL)
NOTES = {
    "messages": "roles system, developer, user, assistant, tool; text and images",
    "model": "id of the served model; another one is a 404",
    "max_tokens": "longest answer, limited by the context; -1: as long as the context allows; 0 or none: GLM_DEFAULT_MAX_TOKENS",
    "max_completion_tokens": "the newer name of `max_tokens`, which is ignored beside it",
    "min_tokens": "shortest answer, in tokens",
    "ignore_eos": "continue to the longest answer; for benchmarks",
    "stop": f"one string or up to {MAX_STOP}; not searched in reasoning",
    "n": "number of choices; each derives its own seed from `seed`",
    "loop_window": "end with `repetition` when so many tokens repeat one pattern; 0: never; default GLM_LOOP_WINDOW",
    "temperature": "0 is greedy",
    "top_k": "0 and -1: no limit",
    "min_p": "drops tokens less probable than this fraction of the most probable one",
    "logit_bias": f"token id to a bias from -100 to 100; up to {MAX_BIASES}",
    "seed": "the same seed gives the same text, whatever else is running",
    "stop_token_ids": "tokens that end the answer, besides the model's own",
    "include_stop_str_in_output": "the stop string that was found is part of the answer",
    "stream_options": "`include_usage`; `continuous_usage_stats`: in every chunk; ignored without `stream`",
    "skip_special_tokens": "false: the tags around boxes stay in the content",
    "regex": "the whole answer matches it; llguidance's syntax",
    "choice": "the answer is one of these strings",
    "grammar": "the answer follows it; Lark as llguidance reads it, or GBNF",
    "verbosity": "`low` and `high` add a system message that asks for a short or a detailed answer",
    "functions": "the older form of `tools`; answers have `function_call` then, one at most",
    "function_call": "`auto`, `none`, or a named function",
    "add_generation_prompt": "the opposite of `continue_final_message`",
    "continue_final_message": "the answer goes on with the text of the last message, the assistant's",
    "request_id": "`request_id` of the answer, in place of the one in the header",
    "include_reasoning": "false: the reasoning is left out of the answer",
    "separate_reasoning": "false: the reasoning is part of the content, in `<think>` tags",
    "logprobs": "of every token",
    "top_logprobs": "alternatives; needs `logprobs`",
    "response_format": "`text`, `json_object`, `json_schema`; enforced; the schema also as `schema` or `value` beside `type`",
    "tools": "functions with JSON schemas; `strict` constrains their calls",
    "tool_choice": "`auto`, `none`, `required` (or `any`), a named function, or `allowed_tools`",
    "parallel_tool_calls": "false: at most one call",
    "chat_template_kwargs": "`enable_thinking`",
    "reasoning_effort": "`none`: no reasoning; "
    + ", ".join(f"`{word}` {'any length' if n is None else f'up to {n} tokens'}" for word, n in EFFORT_TOKENS.items()),
    "thinking_token_budget": "longest reasoning, in tokens; overrides `reasoning_effort`",
    "cache_salt": "no cache is shared with requests of another salt, nor ever between keys",
}
# Words that `api.protocol.vendor_words` translates by a function.
WORDS = {
    "thinking": "`type`: `enabled`, `disabled`, `adaptive`; `budget_tokens` as `thinking_token_budget`",
    "think": "true, false or an effort",
    "enable_thinking": "as in `chat_template_kwargs`",
    "reasoning": "`effort`, `max_tokens`, `enabled`, `exclude`",
    "reasoning_format": "`auto`, `deepseek`, `parsed`: separate; `none`, `raw`: in the content; `hidden`: left out",
    "prompt_mode": "`reasoning`",
    "do_sample": "false: greedy",
    "usage": "`include`: as `stream_options.include_usage`",
    "structured_outputs": "`json`, `regex`, `choice`, `grammar`, `json_object`",
    "guided_json": "a schema for the answer",
    "json_schema": "a schema for the answer",
    "repeat_last_n": "-1; any number without a penalty",
    "samplers": "names of samplers; their order is fixed",
    "sensitive_word_check": "`status`: `DISABLE`",
    "extra_body": "its fields count as fields of the request",
}


def table() -> str:
    properties = ChatRequest.model_json_schema()["properties"]
    rows = ["| Field | State | Values | What it does |", "| --- | --- | --- | --- |"]
    rows += [f"| `{name}` | honoured | {_values(shape)} | {NOTES.get(name, '')} |" for name, shape in properties.items()]
    rows += [f"| `{word}` | honoured | | as `{field}` |" for word, field in SYNONYMS.items()]
    rows += [f"| `{word}` | honoured | | {note} |" for word, note in WORDS.items()]
    reasons: dict[str, list[str]] = {}
    for name, why in {**HARMLESS, **HINTS}.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    rows += [f"| {', '.join(names)} | ignored | any | {why} |" for why, names in reasons.items()]
    rows += [
        f"| `{name}` | ignored | {' or '.join(f'`{_json(value)}`' for value in values)} | holds here anyway; others are refused |"
        for name, values in WITHOUT_EFFECT.items()
    ]
    refused = ", ".join(f"`{name}`" for name in sorted(CHANGES_THE_ANSWER))
    rows += [
        f"| any key inside `messages` and `tools` | ignored | any | but for {refused}, which are refused |",
        "| anything else | ignored | null, empty or false | asks for nothing |",
        "| anything else | refused | | 400 that names it |",
    ]
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    return _TABLE.sub(lambda match: f"{match[1]}{table()}{match[2]}", page)


def _values(shape: dict[str, Any]) -> str:
    kinds = [kind for kind in shape.get("anyOf", [shape]) if kind.get("type") != "null"]
    return " or ".join(filter(None, (_kind(kind) for kind in kinds)))


def _kind(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(str(word) for word in kind["enum"])
    name = kind.get("type", "object" if "$ref" in kind or "oneOf" in kind or "anyOf" in kind else "any")
    bounds = [
        f"{sign} {_number(kind[word])}"
        for sign, word in ((">=", "minimum"), (">", "exclusiveMinimum"), ("<=", "maximum"), ("<", "exclusiveMaximum"))
        if word in kind
    ]
    bounds += [f"{sign} {kind[word]} items" for sign, word in ((">=", "minItems"), ("<=", "maxItems")) if word in kind]
    return " ".join([name, ", ".join(bounds)]).strip()


def _number(value: float) -> str:
    power = abs(int(value)).bit_length() - 1
    return f"{value:g}" if abs(value) < 10**9 else f"{'-' if value < 0 else ''}2^{power}"


def _json(value: Any) -> str:
    return json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
