"""JSON schemas as the grammar compiler can bind them token by token.

Everything here leaves the set of values of a schema as it is, but for what `relaxed` leaves free: patterns that the compiler
cannot read. The compiler itself then skips keywords and formats that it does not know.
"""

from __future__ import annotations

import re
from typing import Any

# The compiler's own format allows any number of digits in a second's fraction, second 60 in any minute and the year 0,
# which the libraries that read the answers refuse.
_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date-time": rf"^{_YEAR}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T{_TIME}$",
    "time": rf"^{_TIME}$",
}
# Lookaround, word boundaries, references to groups, possessive and atomic groups: no finite automaton has them.
_UNREADABLE = re.compile(r"\(\?(=|!|<=|<!|>|P[=>])|(?<!\\)(\\\\)*\\([bBAZzG1-9]|k<)|[*+?}]\+")
# Keywords whose value holds schemas.
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else",
        "unevaluatedItems", "unevaluatedProperties", "contentSchema")  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class GrammarError(ValueError):
    """The form cannot be written as a grammar; the message is for the caller."""


def bindable(schema: dict[str, Any], relaxed: bool = False) -> dict[str, Any]:
    """Raises GrammarError for a reference that leads only to itself."""
    _refuse_endless(schema, schema)
    return _rewritten(schema, relaxed)


def _rewritten(schema: Any, relaxed: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    if (pattern := _FORMATS.get(str(out.get("format")))) and "pattern" not in out:
        del out["format"]
        out["pattern"] = pattern
    if relaxed and isinstance(out.get("pattern"), str) and _UNREADABLE.search(out["pattern"]):
        del out["pattern"]
    for word in _ONE:
        if isinstance(out.get(word), dict):
            out[word] = _rewritten(out[word], relaxed)
    for word in _LISTS:
        if isinstance(out.get(word), list):
            out[word] = [_rewritten(inner, relaxed) for inner in out[word]]
    for word in _MAPS:
        if isinstance(out.get(word), dict):
            out[word] = {name: _rewritten(inner, relaxed) for name, inner in out[word].items()}
    return out


def _refuse_endless(schema: Any, root: dict[str, Any]) -> None:
    """No text satisfies a `$ref` whose chain of references comes back to it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        passed: list[str] = []
        target: Any = part
        while isinstance(target, dict) and isinstance(ref := target.get("$ref"), str) and ref.startswith("#"):
            if ref in passed:
                raise GrammarError(f"no text can satisfy `$ref` {ref!r}, which refers only to itself")
            passed.append(ref)
            target = _resolved(ref, root)
        waiting += [part[word] for word in _ONE if word in part]
        waiting += [inner for word in _LISTS if isinstance(part.get(word), list) for inner in part[word]]
        waiting += [inner for word in _MAPS if isinstance(part.get(word), dict) for inner in part[word].values()]


def _resolved(ref: str, root: Any) -> Any:
    """What a local reference points to; None if there is nothing."""
    for step in filter(None, ref[1:].split("/")):
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and step.isdigit() and int(step) < len(root):
            root = root[int(step)]
        elif isinstance(root, dict):
            root = root.get(step)
        else:
            return None
    return root
