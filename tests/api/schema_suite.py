"""Runs JSON Schema's public test suite, draft 2020-12, against acceptance: `python tests/api/schema_suite.py` writes docs/api.md.

The suite is in the source package of `jsonschema`, which pip fetches; its schemas are compiled for a tokenizer of bytes. For
each keyword the table counts the schemas that the grammar binds, those that are bound in part and checked afterwards, and
those that are refused. A bound schema must take the suite's valid values and no invalid one; the exceptions are counted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fake_model import END, fake_model

from api.engine.text.bindable_schema import GrammarError
from api.engine.text.grammar import GrammarCompiler
from api.engine.text.grammar_text import AnswerForm
from api.protocol.answer_check import unmet

PACKAGE = "jsonschema==4.26.0"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
_TABLE = re.compile(r"(<!-- schema suite: .*? -->\n).*?(<!-- end of schema suite -->)", re.DOTALL)
COLUMNS = ("bound", "checked", "refused", "too strict", "too lenient")


def fetch(folder: Path) -> Path:
    """The source package. Raises CalledProcessError without a package index."""
    found = list(folder.glob("jsonschema-*.tar.gz"))
    if not found:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "jsonschema",
            PACKAGE,
        ]
        subprocess.run([*command, "--dest", str(folder)], check=True, capture_output=True, timeout=300)
        found = list(folder.glob("jsonschema-*.tar.gz"))
    return found[0]


def cases(package: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file of each group of the required tests, and the group."""
    with tarfile.open(package) as archive:
        for member in archive:
            if match := re.search(r"/json/tests/draft2020-12/([\w-]+)\.json$", member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield from ((match[1], group) for group in json.load(file))


class Counts:
    """How the schemas of each keyword fare, and how their values do."""

    def __init__(self) -> None:
        self.by_keyword: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._vocabulary = fake_model().vocabulary
        self._compiler = GrammarCompiler(self._vocabulary, [self._vocabulary.special[text] for text in END])

    def add(self, keyword: str, group: dict[str, Any]) -> None:
        counts, schema = self.by_keyword[keyword], group["schema"]
        if not isinstance(schema, dict):
            counts["refused"] += 1  # `true` and `false`: a schema must be an object here
            return
        try:
            relaxed = self._compiler.compile(AnswerForm(schema, may_think=False)).relaxed
        except GrammarError:
            counts["refused"] += 1
            return
        counts["checked" if relaxed else "bound"] += 1
        for test in group["tests"]:
            text = json.dumps(test["data"], ensure_ascii=False)
            taken = self._takes(schema, text) and not (relaxed and unmet(schema, text))
            if taken != test["valid"]:
                counts["too strict" if test["valid"] else "too lenient"] += 1

    def _takes(self, schema: dict[str, Any], text: str) -> bool:
        grammar = self._compiler.compile(AnswerForm(schema, may_think=False))
        if not all(grammar.accept(token) for token in self._vocabulary.encode(text)):
            return False
        end = self._vocabulary.special["<|user|>"]
        return bool((int(grammar.allowed().view("uint32")[end // 32]) >> (end % 32)) & 1)


def table(counts: Counts) -> str:
    total: Counter[str] = Counter()
    rows = [
        "| Keyword | Bound | Checked | Refused | Valid values not taken | Invalid values taken |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for keyword, counted in sorted(counts.by_keyword.items()):
        total.update(counted)
        rows.append(f"| {keyword} | " + " | ".join(str(counted[column]) for column in COLUMNS) + " |")
    rows.append("| all | " + " | ".join(str(total[column]) for column in COLUMNS) + " |")
    return "\n".join(rows) + "\n"


def count(folder: Path) -> Counts:
    counts = Counts()
    for keyword, group in cases(fetch(folder)):
        counts.add(keyword, group)
    return counts


def with_table(page: str, counts: Counts) -> str:
    return _TABLE.sub(lambda match: f"{match[1]}{table(counts)}{match[2]}", page)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), count(Path(folder))), "utf-8")
