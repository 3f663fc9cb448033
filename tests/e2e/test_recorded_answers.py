"""What users see is as it was recorded: a change that is meant shows as a diff of `recorded/` (see record.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from record import PARTS, ROOT, differences, recorded, requests, run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    yield run(ROOT, Path(tmp_path_factory.mktemp("recorded")), (free_port(), free_port()))


@pytest.mark.parametrize("name", [request["name"] for request in requests()])
def test_a_request_is_answered_as_recorded(name: str, found: dict[str, Any]) -> None:
    assert differences(recorded("answers")[name], found["answers"][name]) == []


@pytest.mark.parametrize("part", [part for part in PARTS if part != "answers"])
def test_what_else_users_see_is_as_recorded(part: str, found: dict[str, Any]) -> None:
    assert differences(recorded(part), found[part]) == []


def test_every_answer_has_a_request() -> None:
    assert list(recorded("answers")) == [request["name"] for request in requests()]
