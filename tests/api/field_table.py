"""Writes the table of fields in docs/api.md from the request's schema: `python tests/api/field_table.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from api.protocol.schemas import (
    CHANGES_THE_ANSWER,
    EFFORT_TOKENS,
    HARMLESS,
    MAX_BIASES,
    MAX_STOP,
    WITHOUT_EFFECT,
    ChatRequest,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
_TABLE = re.compile(r"(<!-- fields: .*? -->\n).*?(<!-- end of fields -->)", re.DOTALL)
NOTES = {
    "messages": "roles system, developer, user, assistant, tool; text and images",
    "model": "id of the served model; another one is a 404",
    "max_tokens": "longest answer, limited by the context; default GLM_DEFAULT_MAX_TOKENS",
    "max_completion_tokens": "the newer name of `max_tokens`",
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
    "stream_options": "`include_usage`",
    "logprobs": "of every token",
    "top_logprobs": "alternatives; needs `logprobs`",
    "response_format": "`text`, `json_object`, `json_schema`; enforced",
    "tools": "functions with JSON schemas; `strict` constrains their calls",
    "tool_choice": "`auto`, `none`, `required`, or a named function",
    "parallel_tool_calls": "false: at most one call",
    "chat_template_kwargs": "`enable_thinking`",
    "reasoning_effort": "`none`: no reasoning; "
    + ", ".join(f"`{word}` {'any length' if n is None else f'up to {n} tokens'}" for word, n in EFFORT_TOKENS.items()),
    "thinking_token_budget": "longest reasoning, in tokens; overrides `reasoning_effort`",
    "cache_salt": "no cache is shared with requests of another salt, nor ever between keys",
}


def table() -> str:
    properties = ChatRequest.model_json_schema()["properties"]
    rows = ["| Field | Values | What it does |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {_values(shape)} | {NOTES.get(name, '')} |" for name, shape in properties.items()]
    rows += [f"| `{name}` | any | ignored and named: {why} |" for name, why in HARMLESS.items()]
    rows += [
        f"| `{name}` | {' or '.join(f'`{_json(value)}`' for value in values)} | ignored and named: it holds here anyway; others 400 |"
        for name, values in WITHOUT_EFFECT.items()
    ]
    rows += [
        "| any key inside `messages` and `tools` | any | ignored and named, but for "
        + ", ".join(f"`{name}`" for name in sorted(CHANGES_THE_ANSWER))
        + ": 400 |",
        "| anything else | null, empty or false | ignored and named |",
        "| anything else | | 400 that names it |",
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
    return str(value).lower().replace("'", '"')


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
