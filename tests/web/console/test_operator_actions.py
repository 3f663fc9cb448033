"""Requests of operators: what is written into the checker's store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from monitor.store.store import REQUEST_KINDS, Store
from web.console import checker_store
from web.console.operator_actions import ACTIONS, OperatorAction, arguments_of


def test_the_actions_are_those_of_the_checker() -> None:
    assert {action.kind for action in ACTIONS} == set(REQUEST_KINDS)


def test_actions_that_lose_answers_must_be_typed() -> None:
    assert {action.kind for action in ACTIONS if action.typed} == {"restart", "drain"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("pause", {"until": 7300.0}), ("silence", {"until": 7300.0}), ("maintenance", {"from": 100.0, "until": 7300.0}),
     ("probe", {}), ("reset", {"reason": "asked by Ann on the console"})],
)  # fmt: skip
def test_a_request_has_the_arguments_of_its_kind(kind: str, expected: dict[str, object]) -> None:
    assert arguments_of(OperatorAction(kind, ""), 2, "Ann", 100.0) == expected


def test_a_request_is_a_row_that_the_checker_reads(tmp_path: Path) -> None:
    number = checker_store.add_request(tmp_path, "console: Ann", "restart", "api", {})

    with closing(Store.open(tmp_path)) as store:
        taken = store.take_request(1.0)
    assert taken is not None
    assert (taken["id"], taken["kind"], taken["target"], taken["actor"]) == (number, "restart", "api", "console: Ann")


def test_an_unwritable_folder_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(checker_store.HistoryUnavailable):
        checker_store.add_request(tmp_path / "file", "Ann", "probe", "", {})


def test_evidence_is_read_only_from_the_incident_s_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "incidents" / "api-1" / "1"
    folder.mkdir(parents=True)
    (folder / "stacks.txt").write_text("x")
    (tmp_path / "secret").write_text("y")
    (folder / "link").symlink_to(tmp_path / "secret")

    assert [path.name for path in checker_store.evidence_files(tmp_path, "api-1")] == ["stacks.txt"]
    assert checker_store.evidence_files(tmp_path, "../../") == []
