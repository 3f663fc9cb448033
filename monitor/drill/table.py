"""The drill's table in Markdown, one row per fault. A drill of some faults updates their rows and keeps the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from monitor.tell.report import replace_file

BEGIN, END = "<!-- drill -->", "<!-- /drill -->"
HEAD = (
    "| fault | what is done | verdicts seen | found after | recovered after | restarts | result | measured |",
    "|---|---|---|---|---|---|---|---|",
)


class MarkersMissing(ValueError):
    """The file has text but no markers for the table."""


def lines(rows: Mapping[str, str], order: list[str]) -> list[str]:
    return [*HEAD, *(rows[name] for name in sorted(rows, key=order.index))]


def rows(path: Path) -> dict[str, str]:
    """The rows of the table in this file, by fault."""
    return _parts(path)[1]


def check(path: Path) -> None:
    """Raises MarkersMissing or OSError, before the drill rather than after it."""
    _parts(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8"):
        pass


def update(path: Path, rows: Mapping[str, str], order: list[str]) -> None:
    before, old, after = _parts(path)
    known = {name: row for name, row in old.items() if name in order}
    rendered = "\n".join(lines({**known, **rows}, order))
    replace_file(path, f"{before}{BEGIN}\n{rendered}\n{END}{after}")


def _parts(path: Path) -> tuple[str, dict[str, str], str]:
    """(text before the table, its rows by fault, text after it)."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.strip():
        return "", {}, "\n"
    before, begin, rest = text.partition(BEGIN)
    inner, end, after = rest.partition(END)
    if not begin or not end:
        raise MarkersMissing(f"{path} has no markers for the table: add {BEGIN} and {END} on lines of their own")
    rows = [line for line in inner.splitlines() if line.startswith("| ") and line not in HEAD]
    return before, {line.split("|")[1].strip(): line for line in rows}, after
