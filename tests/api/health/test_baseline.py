"""/info shows the checker's baseline, whatever is in its file."""

from __future__ import annotations

import json
import os

import pytest

from api.health.baseline import MAX_BYTES, read_baseline

GOOD = {
    "key": {"model": "fake", "revision": "1", "recipe": "2"},
    "kinds": {"color": {"asked": 20, "right": 20}, "颜色": {"asked": 20, "right": 1}},
    "taken_at": "2026-11-23T10:00:00+00:00",
}


def test_info_shows_the_baseline(serve, tmp_path) -> None:
    served = serve()
    shown = lambda: served.client.get("/info").json()["health_baseline"]  # noqa: E731

    assert shown() is None
    (tmp_path / "logs").mkdir(exist_ok=True)
    (tmp_path / "logs" / "baseline.json").write_text(json.dumps(GOOD))
    assert shown() == GOOD


DAMAGED = {
    "empty": b"",
    "cut": json.dumps(GOOD).encode()[:-5],
    "no object": b"[1]",
    "no text": b"\xff\xfe\x00",
    "not a number": b'{"a": NaN}',
    "an infinite number": b'{"a": 1e999}',
    "half of a pair": b'{"a": "\\ud800"}',
    "deep": b'{"a":' + b"[" * 30_000,
    "large": b'{"a": "' + b"x" * MAX_BYTES + b'"}',
    "digits": b'{"a": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_no_baseline(tmp_path, name: str) -> None:
    (tmp_path / "baseline.json").write_bytes(DAMAGED[name])

    assert read_baseline(tmp_path) is None


def test_a_pipe_or_folder_is_not_opened(tmp_path) -> None:
    os.mkfifo(tmp_path / "baseline.json")
    assert read_baseline(tmp_path) is None
    (tmp_path / "baseline.json").unlink()
    (tmp_path / "baseline.json").mkdir()
    assert read_baseline(tmp_path) is None
