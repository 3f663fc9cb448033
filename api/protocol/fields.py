"""The rule for every field of every request: honoured, ignored and named, or refused by name. Nothing is dropped silently.

How a wire format uses it, in one line:

    request = check(MessagesRequest, parse_object(body), ignored, RULES)

`check` returns the validated model, adds to `ignored` what has no effect here, and raises the 400 error for the rest:

- a field of the model is honoured;
- a field is ignored, and named, if it asks for nothing: null at any depth, empty or false; listed as harmless, or with
  the value of `defaults` that holds here anyway; or any key inside `echoed`, where clients send back what they were given;
- any other field is refused, and so is, inside `echoed`, a key that would change the answer (`refused`).

A route makes one IgnoredFields for each request, with `IgnoredFields(strict)`: strict refuses what it would ignore, but
for harmless fields, top-level nulls and values that hold here anyway. `api.routes.chat.answer` does all of it for a chat
request in any wire format: it passes `ignored` to the format's parser, and puts the names into the header x-glm-ignored,
the answer, the log and the metrics. A validator may name a field itself: `ignored_in(info).note("stop")`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from api.errors import ServingError, invalid
from api.protocol.body import shown

IGNORED_HEADER, STRICT_HEADER = "x-glm-ignored", "x-glm-strict"
MAX_NAMES = 64  # named for one request; the rest is counted
MAX_NAME = 64  # characters of one step of a path
_MAX_PROBLEMS = 10_000  # of one body
_ROUNDS = 4  # a field may show only once another is gone
_PLAIN = re.compile(r"[A-Za-z0-9_.$@:\[\]-]+")
Checked = TypeVar("Checked", bound=BaseModel)


class Strict(BaseModel):
    """A request or a part of one: no value is converted into another type, and `check` decides about unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class FieldRules:
    """What a wire format does with the fields that its model does not have."""

    harmless: Mapping[str, str] = field(default_factory=dict)  # top-level fields that never change an answer, and why
    hints: Mapping[str, str] = field(default_factory=dict)  # the same, but refused under `strict`
    # Top-level fields of other servers, and the values that match what happens here anyway; other values are refused.
    defaults: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    echoed: frozenset[str] = frozenset({"messages", "tools"})  # in these an unknown key is somebody's note
    refused: frozenset[str] = frozenset()  # but not these keys, which would change the answer


class IgnoredFields:
    """The fields of one request that have no effect. `names` are paths without the numbers of items: `messages[].id`."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._names: dict[str, None] = {}
        self._more = False

    @property
    def names(self) -> list[str]:
        return [*self._names, *(["..."] if self._more else [])]

    def note(self, path: str, harmless: bool = False) -> None:
        """Name a field that is ignored. Raises the 400 error under `strict`, unless it is `harmless`."""
        if self.strict and not harmless:
            raise unsupported(path)
        name = re.sub(r"\[\d+\]", "[]", path)
        if not _PLAIN.fullmatch(name):
            name = re.sub(r"[^A-Za-z0-9_.$@:\[\]-]", "?", name)
        if name in self._names or len(self._names) < MAX_NAMES:
            self._names[name] = None
        else:
            self._more = True

    def headers(self) -> dict[str, str]:
        return {IGNORED_HEADER: ", ".join(self.names)} if self._names else {}


def ignored_in(info: ValidationInfo) -> IgnoredFields:
    """The ignored fields of the request that is being validated, for a validator to add to."""
    return info.context["ignored"] if info.context else IgnoredFields()


def unsupported(path: str) -> ServingError:
    return invalid(f"`{path}` is not supported.", path, "unsupported_parameter")


def check(kind: type[Checked], data: dict[str, Any], ignored: IgnoredFields, rules: FieldRules) -> Checked:
    """The request in `data`, from which what is ignored is deleted. Raises the 400 error for the first field that is wrong."""
    known = set(kind.model_fields) | {info.alias for info in kind.model_fields.values() if info.alias}
    unknown = [name for name in data if name not in known]
    if len(unknown) > _MAX_PROBLEMS:
        raise invalid(f"There are more than {_MAX_PROBLEMS} fields that are not known here.") from None
    for name in unknown:
        _settle(name, data[name], ignored, rules)
        del data[name]
    for _ in range(_ROUNDS):
        try:
            return kind.model_validate(data, context={"ignored": ignored})
        except ValidationError as error:
            if error.error_count() > _MAX_PROBLEMS:
                raise invalid(f"There are more than {_MAX_PROBLEMS} fields that are not known here.") from None
            problems = error.errors(include_url=False)
        if _made_whole(data, problems):
            continue
        wrong = next((problem for problem in problems if not _may_go(problem, rules)), None)
        if wrong is not None:
            raise _explain(wrong)
        for problem in problems:
            if _delete(data, problem["loc"]):
                ignored.note(_path(problem["loc"]))
            else:
                raise _explain(problem)
    raise _explain(problems[0])


def _settle(name: str, value: Any, ignored: IgnoredFields, rules: FieldRules) -> None:
    """Note or refuse an unknown top-level field."""
    if (
        name in rules.harmless
        or value is None
        or any(_same(value, default) for default in rules.defaults.get(name, ()))
    ):
        ignored.note(_step(name), harmless=True)
    elif name in rules.defaults:
        allowed = " or ".join(shown(default) for default in rules.defaults[name])
        raise invalid(f"`{name}` must be {allowed}. Given: {shown(value)}", name, "unsupported_value")
    elif name in rules.hints or asks_for_nothing(value):
        ignored.note(_step(name))
    else:
        raise unsupported(_step(name))


def asks_for_nothing(value: Any) -> bool:
    """Whether a field with this value is as good as absent: empty, false, or made of such values only."""
    if isinstance(value, dict):
        return all(asks_for_nothing(inner) for inner in value.values())
    return value is None or value is False or value == "" or value == []


def _same(value: Any, default: Any) -> bool:
    """Equal as JSON, in which true is not 1."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _may_go(problem: ErrorDetails, rules: FieldRules) -> bool:
    """Whether the request means the same without this value."""
    steps = [step for step in problem["loc"] if isinstance(step, str) and not step.startswith("#")]
    if problem["input"] is None:
        return problem["type"] != "missing" and len(steps) > 1
    if problem["type"] != "extra_forbidden":
        return False
    if asks_for_nothing(problem["input"]):
        return True
    return steps[0] in rules.echoed and steps[-1] not in rules.refused


def _made_whole(data: Any, problems: list[ErrorDetails]) -> bool:
    """Write 5.0 as 5 where an integer is wanted, as languages without integers cannot; whether there was such a number."""
    found = False
    for problem in problems:
        given = problem["input"]
        if problem["type"] not in ("int_type", "int_from_float") or not isinstance(given, float) or not given.is_integer():
            continue
        *outer, last = [step for step in problem["loc"] if not (isinstance(step, str) and step.startswith("#"))]
        place = data
        try:
            for step in outer:
                place = place[step]
            if place[last] == given and isinstance(place[last], float):
                place[last] = int(given)
                found = True
        except (KeyError, IndexError, TypeError):
            continue
    return found


def _delete(data: Any, location: tuple[int | str, ...]) -> bool:
    """Delete what is at a place in `data`; False if there is nothing, since a validator has made the value itself."""
    *outer, last = [step for step in location if not (isinstance(step, str) and step.startswith("#"))]
    for step in outer:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return False
    if isinstance(data, dict) and last in data:
        del data[last]
        return True
    return False


# Pydantic's types of error, in terms of the API.
_BOUNDS = {"greater_than_equal": (">=", "ge"), "less_than_equal": ("<=", "le"), "greater_than": (">", "gt"),
           "less_than": ("<", "lt")}  # fmt: skip
_COUNTS = {"too_short": (">=", "min_length", "items"), "too_long": ("<=", "max_length", "items"),
           "string_too_short": (">=", "min_length", "characters"),
           "string_too_long": ("<=", "max_length", "characters")}  # fmt: skip
_KINDS = {
    "string_type": "a string", "string_unicode": "a string of whole Unicode characters", "bool_type": "true or false",
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
        return unsupported(param)
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
            path += f".{_step(step)}" if path else _step(step)
    return path


def _step(name: str) -> str:
    """A name for an error message, a header or a label: clients can send names of any length."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."
