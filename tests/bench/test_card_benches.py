"""The benches of a card run in small on the CPU, so that none fails on the day for a silly reason; that of the HTTP side
runs as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_bench_of_graphs_runs_dry(tmp_path: Path) -> None:
    run("bench.graphs_gpu", "--dry", "--out", str(tmp_path / "figures.jsonl"))

    lines = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert {line["section"] for line in lines} == {
        "start", "decode step", "kernels", "sampler", "prefill", "vision", "several images", "same tokens",
    }  # fmt: skip
    assert not [line for line in lines if "failed" in line]
    same = {line["beside"]: line for line in lines if line["section"] == "same tokens"}
    assert same["operations"]["answers_equal"] == same["operations"]["of"] > 0


def test_the_bench_of_the_http_side_passes_every_token_on() -> None:
    printed = run("bench.edge", "--step-ms", "1", "--queued", "--streams", "2", "--tokens", "50", "--port", str(free_port()))

    assert "2 streams" in printed and "tokens an event" in printed
