"""The JSON of a request's body: an object within limits, and values shown in error messages."""

from __future__ import annotations

import json
from typing import Any

from api.errors import ServingError, invalid

MAX_DEPTH = 64  # of nested lists and objects; far more than any schema or call has


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises the 400 error for anything but a JSON object."""
    try:
        data = json.loads(body, object_pairs_hook=_unique)
        _refuse_lone_surrogates(body, data)
    except json.JSONDecodeError as error:
        raise _not_an_object(f"It is not JSON: {error.msg} at character {error.pos}.") from None
    except UnicodeError:
        raise _not_an_object("It is not whole Unicode characters in UTF-8.") from None
    except (ValueError, RecursionError):  # thousands of digits in a number, or thousands of brackets
        raise _not_an_object("It cannot be parsed: it is nested too deeply, or a number is too long.") from None
    if not isinstance(data, dict):
        raise _not_an_object(f"Given: {shown(data)}")
    if (name := too_deep(data)) is not None:
        raise invalid(f"`{name}` must have <= {MAX_DEPTH} levels of lists and objects.", name, "too_deep")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises the 400 error for a name that is given twice: readers of JSON disagree about which of the two counts."""
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise invalid(f"`{name[:60]}` is given twice in one object.", name[:60], "duplicate_key")
    return data


def _not_an_object(reason: str) -> ServingError:
    return invalid(f"The body must be a JSON object. {reason}", code="invalid_json")


def parse_json(text: str) -> Any:
    """The value, or None if it is not JSON or has a lone surrogate in it."""
    try:
        value = json.loads(text)
        _refuse_lone_surrogates(text, value)
        return value
    except (ValueError, RecursionError):
        return None


def _refuse_lone_surrogates(text: str | bytes, value: Any) -> None:
    """Raises UnicodeError: JSON can escape a lone surrogate, which UTF-8 cannot encode."""
    if "\\u" in text if isinstance(text, str) else b"\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()


def too_deep(data: dict[str, Any]) -> str | None:
    """The first field that is nested deeper than MAX_DEPTH."""
    for name, value in data.items():
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [
                inner
                for outer in level
                if isinstance(outer, dict | list)
                for inner in (outer.values() if isinstance(outer, dict) else outer)
            ]
            if not level:
                break
        if level:
            return name
    return None


def shown(value: Any) -> str:
    """A value as JSON, cut to 60 characters: enough to recognise it, never a whole prompt or image."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
