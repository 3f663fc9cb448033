"""Checks a finished answer against the parts of its schema that no grammar could bind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError, validators
from referencing import Registry

MOST = 8  # named for one answer
PATTERN_S = 0.2  # for one text; patterns come from callers, and some take forever


def unmet(schema: dict[str, Any], answer: str) -> list[str]:
    """What the answer does not fit, as `path: keyword`; empty if it fits, or cannot be checked.

    Nothing is fetched. May take a while for a long answer, so call it in a thread.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return [": not JSON"]
    try:
        # Without a registry the library would fetch references from the network.
        kind = _WithPatternProperties if "patternProperties" in json.dumps(schema) else _Validator
        checker = kind(schema, registry=Registry(), format_checker=Draft202012Validator.FORMAT_CHECKER)
        return [f"{error.json_path}: {error.validator}" for error in islice(checker.iter_errors(value), MOST)]
    except Exception:  # of a schema that is none, or of a reference that leads nowhere
        return []


def _matches(pattern: str, text: str) -> bool:
    """Counts as a match if it cannot be found out in time."""
    try:
        return regex.search(pattern, text, timeout=PATTERN_S, concurrent=True) is not None
    except (TimeoutError, regex.error):
        return True


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError(f"does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: dict[str, Any], value: Any, _: Any) -> Iterator[ValidationError]:
    for pattern, schema in patterns.items() if isinstance(value, dict) else ():
        for name, inner in value.items():
            if _matches(pattern, name):
                yield from validator.descend(inner, schema, path=name, schema_path=pattern)


def _additional_properties(
    validator: Any, additional: Any, value: Any, schema: dict[str, Any]
) -> Iterator[ValidationError]:
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name not in known and not any(_matches(pattern, name) for pattern in patterns):
            if isinstance(additional, dict):
                yield from validator.descend(inner, additional, path=name)
            elif additional is False:
                yield ValidationError(f"{name!r} is not allowed")


def _unchecked(*_: Any) -> Iterator[ValidationError]:
    yield from ()


_Validator = validators.extend(
    Draft202012Validator,
    {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    },
)
# To find what is evaluated, the library would match patterns without a limit in time.
_WithPatternProperties = validators.extend(_Validator, {"unevaluatedProperties": _unchecked})
