"""The counts of the public schema suite in docs/api.md are those of today."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from schema_suite import PAGE, count, table, with_table


def test_the_page_has_the_counts_of_the_public_suite(tmp_path: Path) -> None:
    try:
        counts = count(tmp_path)
    except subprocess.SubprocessError as error:
        pytest.skip(f"the suite cannot be fetched: {getattr(error, 'stderr', b'')[-200:]!r}")

    page = PAGE.read_text("utf-8")
    assert len(counts.by_keyword) > 40
    assert table(counts) in page and with_table(page, counts) == page, "run: python tests/api/schema_suite.py"
