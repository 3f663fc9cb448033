"""The last lines of a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from web.console import log_tail

LINES = [
    "10:00:00 INFO api event=request request=abc",
    "10:00:01 DEBUG api event=detail",
    "10:00:02 ERROR api event=boom request=xyz",
    "Traceback (most recent call last):",
    "ValueError: no",
    "10:00:03 INFO api event=request request=def",
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "api.log"
    path.write_text("\n".join(LINES) + "\n")
    return path


def test_the_last_lines_are_in_order(log: Path) -> None:
    assert log_tail.tail(log, 2) == LINES[-2:]


def test_a_traceback_stays_with_its_error(log: Path) -> None:
    assert log_tail.tail(log, 100, at_least="ERROR") == LINES[2:5]


def test_a_request_is_found_by_its_id(log: Path) -> None:
    assert log_tail.tail(log, 100, contains="XYZ") == [LINES[2]]


def test_a_huge_log_is_read_from_its_end_only(log: Path) -> None:
    with log.open("w") as file:
        file.writelines(f"{n:09d} INFO line\n" for n in range(200_000))

    found = log_tail.tail(log, 10**9)

    assert found[-1] == "000199999 INFO line"
    assert all(len(line) == 19 for line in found)
    assert sum(len(line) + 1 for line in found) <= log_tail.MAX_BYTES


def test_invalid_utf_8_does_not_raise(log: Path) -> None:
    log.write_bytes(b"\xff\xfe\x00 rubbish\nINFO end\n")

    assert log_tail.tail(log, 1) == ["INFO end"]


def test_levels_of_the_api_s_log_format_are_read_and_lines_without_one_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "mixed.log"
    lines = "2026-11-22T22:04:03.842+00:00 level=info event=request note=ERROR", "2026-11-22 level=error event=boom"
    path.write_text("\n".join(["starting", *lines]) + "\n")

    assert log_tail.tail(path, 9, at_least="INFO") == ["starting", *lines]
    assert log_tail.tail(path, 9, at_least="ERROR") == ["starting", lines[1]]
