"""What start.sh prints while models load, where it is no terminal."""

from __future__ import annotations

import io

from deploy.loading import LoadingLine


def test_two_that_load_by_turns_have_a_line_for_each_change():
    shown = io.StringIO()
    line = LoadingLine(shown)
    for progress in (0, 0, 0, 50, 50):
        for replica in (0, 1):
            line.show(f"Replica {replica} loads the model: {progress} %", False)

    assert shown.getvalue().splitlines() == [f"Replica {replica} loads the model: {progress} %" for progress in (0, 50) for replica in (0, 1)]
