"""The format of tool arguments between GLM's tags: strings as they are, other values as JSON.

Shared by the grammar that forces calls and the parser that reads them, so that they agree. Knows JSON schemas as plain
data.
"""

from __future__ import annotations

import json
from typing import Any

_MAX_DEPTH = 16  # of references; a schema may refer to itself


def read_value(text: str, schema: Any, root: dict[str, Any]) -> Any:
    """The value of an argument by its schema; text that does not match the schema stays a string."""
    if is_raw_string(schema, root):
        return None if text == "null" and _may_be_null(schema, root) else text
    if text in ("True", "False") and _kinds(_resolved(schema, root)) == {"boolean"}:  # as Python prints them
        return text == "True"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def is_raw_string(schema: Any, root: dict[str, Any], depth: int = 0) -> bool:
    """Whether a value of this schema is written without JSON quoting. `root`: the schema that `$ref` refers to."""
    schema = _resolved(schema, root)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return False
    if "string" in _kinds(schema):
        return True
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return all(isinstance(item, str) for item in schema["enum"])
    if "const" in schema:
        return isinstance(schema["const"], str)
    options = [option for word in ("anyOf", "oneOf") for option in _list(schema.get(word))]
    return any(is_raw_string(option, root, depth + 1) for option in options)


def _may_be_null(schema: Any, root: dict[str, Any]) -> bool:
    schema = _resolved(schema, root)
    options = [schema, *(_resolved(o, root) for word in ("anyOf", "oneOf") for o in _list(schema.get(word)))]
    return any("null" in _kinds(option) for option in options)


def _kinds(schema: Any) -> set[str]:
    kinds = schema.get("type") if isinstance(schema, dict) else None
    return {k for k in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(k, str)}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolved(schema: Any, root: dict[str, Any]) -> Any:
    """Follow a local `$ref`; one that cannot be resolved is returned unchanged."""
    for _ in range(_MAX_DEPTH):
        ref = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(ref, str) or not ref.startswith("#/"):
            return schema
        target: Any = root
        for step in ref[2:].split("/"):
            target = target.get(step) if isinstance(target, dict) else None
        if target is None:
            return schema
        schema = target
    return schema
