"""A body's bytes to a validated object, or the error that names the first field that is wrong."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from api.errors import ServingError, invalid

MAX_DEPTH = 64  # of nested lists and objects; far more than any schema or call has


class Strict(BaseModel):
    """An unknown field is an error, and no value is converted into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Checked = TypeVar("Checked", bound=BaseModel)


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises the 400 error for anything but a JSON object."""
    try:
        data = json.loads(body)
        _refuse_lone_surrogates(body, data)
    except json.JSONDecodeError as error:
        raise _no_object(f"It is not JSON: {error.msg} at character {error.pos}.") from None
    except UnicodeError:
        raise _no_object("It is not whole Unicode characters in UTF-8.") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise _no_object("It is not JSON that can be read.") from None
    if not isinstance(data, dict):
        raise _no_object(f"Given: {shown(data)}")
    if (name := too_deep(data)) is not None:
        raise invalid(f"`{name}` must have <= {MAX_DEPTH} levels of lists and objects.", name, "too_deep")
    return data


def _no_object(why: str) -> ServingError:
    return invalid(f"The body must be a JSON object. {why}", code="invalid_json")


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


def check(kind: type[Checked], data: dict[str, Any]) -> Checked:
    """Raises the 400 error that names the first field that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error.errors()[0]) from None


# What pydantic's kinds of error mean to a caller.
_BOUNDS = {"greater_than_equal": (">=", "ge"), "less_than_equal": ("<=", "le"), "greater_than": (">", "gt"),
           "less_than": ("<", "lt")}  # fmt: skip
_COUNTS = {"too_short": (">=", "min_length", "items"), "too_long": ("<=", "max_length", "items"),
           "string_too_short": (">=", "min_length", "characters"),
           "string_too_long": ("<=", "max_length", "characters")}  # fmt: skip
_KINDS = {
    "string_type": "a string", "string_unicode": "a string of whole characters", "bool_type": "true or false",
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "finite_number": "a finite number", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
}  # fmt: skip


def _explain(problem: ErrorDetails) -> ServingError:
    param = _path(problem["loc"])
    context, kind = problem.get("ctx", {}), problem["type"]
    given = f" Given: {shown(problem['input'])}"
    if kind == "missing":
        return invalid(f"`{param}` is required.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        return invalid(f"`{param}` is not supported.", param, "unsupported_parameter")
    if kind in _BOUNDS:
        sign, bound = _BOUNDS[kind]
        return invalid(f"`{param}` must be {sign} {context[bound]:g}.{given}", param)
    if kind in _COUNTS:
        sign, bound, things = _COUNTS[kind]
        count = context.get("actual_length") or len(problem["input"])
        return invalid(f"`{param}` must have {sign} {context[bound]} {things}. Given: {count}", param)
    if kind == "literal_error":
        return invalid(f"`{param}` must be {context['expected']}.{given}", param)
    if kind == "string_pattern_mismatch":
        return invalid(f"`{param}` must match {context['pattern']}.{given}", param)
    if kind in _KINDS:
        return invalid(f"`{param}` must be {_KINDS[kind]}.{given}", param)
    if problem["msg"].startswith("must be"):
        return invalid(f"`{param}` {problem['msg']}.{given}", param)
    return invalid(f"`{param}`: {problem['msg']}.", param)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].text`; a step that begins with # is a tag of a union, not a field."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("#"):
            path += f".{step}" if path else step
    return path


def shown(value: Any) -> str:
    """Enough of a value to recognise it; never a whole prompt or image."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
