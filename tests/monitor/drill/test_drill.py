"""Some faults of the drill on the real service; the whole drill takes half an hour, its result is in docs/operations.md."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from ports import free_port

from monitor.drill import table
from monitor.drill.catalogue import climbed
from monitor.drill.checker import OwnRuns
from monitor.drill.context import FaultContext
from monitor.drill.drill import Drill
from monitor.judge import ladder
from monitor.store.store import Store

ROOT = Path(__file__).resolve().parents[3]
DRILLED = ("engine-dead", "clock-jump", "saturated")
ORDER = ["first", "second", "third"]


def test_a_short_drill_of_the_real_service_passes(tmp_path, monkeypatch):
    """start.sh, the demo model, real faults and real runs of the checker: detected, cured, and left alone where required."""
    root = tmp_path / "project"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "docs/", "bench/")) and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    ports = free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")} | {
        "GLM_API_HOST": "127.0.0.1", "GLM_WEB_HOST": "127.0.0.1", "GLM_API_PORT": str(ports[0]), "GLM_WEB_PORT": str(ports[1]),
        "GLM_MODEL": "models/shapes", "GLM_THREADS": "1", "GLM_TEST_FAULTS": "true", "CONDA_PREFIX": sys.prefix,
        "CONDA_DEFAULT_ENV": "tests", "GLM_START_TIMEOUT_S": "240", "GLM_QUEUE_SIZE": "8",
    }  # fmt: skip
    started = subprocess.run(["bash", "start.sh"], cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        done = subprocess.run(
            [sys.executable, "health_check.py", "drill", "--yes", "--period", "2", "--quick", "--out", "table.md", *DRILLED], cwd=root, env=env,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        for name in DRILLED:
            assert f"pass  {name}" in done.stdout
        trace = json.loads((root / "logs" / "drill" / "engine-dead.json").read_text())
        assert [step["word"] for step in trace["runs"]][:2] == ["dead", "healthy"] and trace["restarts"] == 1
        rows = [line for line in (root / "table.md").read_text().splitlines() if line.startswith("| ")][1:]
        assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in DRILLED]
        assert "unknown, dead, healthy" in rows[1] or "dead, unknown, healthy" in rows[1], "the clock jump is not evidence"
        assert "questions rejected" in rows[2] and "dead" not in rows[2]
    finally:
        subprocess.run(["bash", "stop.sh"], cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True)


def test_parts_of_the_drill_are_merged_into_one_table_within_other_text(tmp_path):
    document = tmp_path / "operations.md"
    document.write_text(f"# Before\n{table.BEGIN}\n{table.END}\n# After\n")

    table.update(document, {"third": "| third | old |"}, ORDER)
    table.update(document, {"first": "| first | new |", "third": "| third | new |"}, ORDER)

    assert document.read_text().splitlines() == [
        "# Before", table.BEGIN, *table.HEAD, "| first | new |", "| third | new |", table.END, "# After",
    ]  # fmt: skip


def test_a_file_without_markers_is_refused_before_the_drill(tmp_path):
    (tmp_path / "notes.md").write_text("other text\n")

    with pytest.raises(table.MarkersMissing, match="has no markers for the table"):
        table.check(tmp_path / "notes.md")
    table.check(tmp_path / "new.md")
    assert (tmp_path / "notes.md").read_text() == "other text\n"


def test_the_rungs_of_one_fault_are_neither_proof_nor_missing_for_the_next(make_settings):
    settings = make_settings(1)
    taken = ladder.Ladder((ladder.Step(ladder.DROP_CACHES, time.time(), "done"), ladder.Step(ladder.RELOAD_WEIGHTS, time.time(), "failed")))
    with contextlib.closing(Store.open(settings.log_dir)) as store:
        with store.transaction():
            store.put("ladder", ladder.to_dict(taken))
        report = {"targets": {"api": {"rungs": [asdict(step) for step in taken.steps]}}}
        assert climbed(ladder.DROP_CACHES)(report, store) and not climbed(ladder.RELOAD_WEIGHTS)(report, store)

    context = FaultContext(settings)
    Drill(settings, context, OwnRuns(context, 1.0))._reset_state()

    with contextlib.closing(Store.read_only(settings.log_dir)) as store:
        assert ladder.next_rung(ladder.from_dict(store.get("ladder"))) == ladder.DROP_CACHES
