"""The JSON report: its keys, its numbers, and the atomic write."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest

from monitor.tell import report


def a_report(**changes: object) -> dict:
    return {
        **report.build("healthy", True, [], {"cpu_percent": 12.5, "memory_used_percent": 40.0}, {}, {}, 1.0),
        **changes,
    }


def test_six_keys_are_at_the_top_and_an_absent_gpu_is_null():
    parsed = json.loads(report.to_json(a_report()))

    assert datetime.now(UTC) - datetime.fromisoformat(parsed["timestamp"]) < timedelta(minutes=1)
    assert parsed["gpu_load"] is None and parsed["gpu_memory_used"] is None
    assert (parsed["cpu_percent"], parsed["memory_used_percent"], parsed["service_healthy"]) == (12.5, 40.0, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")], {"deep": (float("nan"),)}])
def test_nan_and_infinity_become_null(value):
    text = report.to_json(a_report(gpu_load=value))

    assert "NaN" not in text and "Infinity" not in text
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_a_reader_never_sees_a_partial_file(tmp_path):
    report.write(a_report(reasons=["first"]), tmp_path)
    stop, broken = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads((tmp_path / "health.json").read_text())
            except ValueError as error:
                broken.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for size in range(200):
        report.write(a_report(reasons=["x" * 50 * size]), tmp_path)
    stop.set()
    reader.join()

    assert not broken
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"]
    assert (tmp_path / "health.json").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_report_and_no_temporary_file(tmp_path, monkeypatch):
    report.write(a_report(reasons=["old"]), tmp_path)

    with pytest.raises(TypeError):
        report.write(a_report(reasons=[object()]), tmp_path)

    assert json.loads((tmp_path / "health.json").read_text())["reasons"] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"]
