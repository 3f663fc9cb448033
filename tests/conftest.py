"""The order in which files are handed to the parallel workers."""

from __future__ import annotations

import pytest

# The longest first, so that no worker is left alone with one of them at the end. Whole files go to a worker: their tests
# share servers, browsers and models.
LONGEST = (
    "tests/monitor/test_schedule.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
