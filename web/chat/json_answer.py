"""Parses an answer as JSON and validates it against the requested schema. Pure functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jsonschema

_FENCE = "```"


@dataclass(frozen=True)
class JsonAnswer:
    """`value`: the parsed JSON. `problem` and `where`: the first error and its position, both empty without one."""

    value: Any = None
    is_json: bool = True
    problem: str = ""
    where: str = ""


def parse(text: str, schema: dict[str, Any] | None) -> JsonAnswer | None:
    """None for text that is not JSON and was not requested as JSON.

    `schema`: the JSON schema that was requested; {}: any JSON; None: free text.
    """
    bare = _without_fence(text.strip())
    if schema is None and not bare.startswith(("{", "[")):
        return None
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError) as error:
        if schema is None:
            return None
        problem = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
        where = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return JsonAnswer(is_json=False, problem=problem, where=where)
    if not schema:
        return JsonAnswer(value)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    first = min(errors, key=lambda error: list(map(str, error.path)), default=None)
    return JsonAnswer(value, problem=first.message[:300], where=first.json_path) if first else JsonAnswer(value)


def parse_schema(text: str) -> dict[str, Any]:
    """Parses a JSON schema. Raises ValueError with the reason if it is not one."""
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("not an object")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(error.message) from None
    return schema


def parse_tools(text: str) -> list[dict[str, Any]]:
    """Parses tool definitions of OpenAI's API. Raises ValueError with the reason if they are not."""
    tools = json.loads(text)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and "function" in tool for tool in tools):
        raise ValueError('not a list of {"type": "function", "function": {...}}')
    return tools


def _without_fence(text: str) -> str:
    """Models often wrap JSON in a fenced code block."""
    if not (text.startswith(_FENCE) and text.endswith(_FENCE) and "\n" in text):
        return text
    return text.split("\n", 1)[1].removesuffix(_FENCE).strip()
