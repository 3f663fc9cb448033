"""The checker beside a real server whose first download is slow: slow is not ill, standing still is."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import Fault, HubStandIn, files_of
from ports import free_port

from monitor import check
from monitor.observe import processes
from settings import Settings

ROOT = Path(__file__).resolve().parents[2]
STILL_S = 10.0  # longer than the libraries of a loaded machine take to be imported
LIMIT_S = 240.0


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    stand_in = HubStandIn(files_of(ROOT / "models" / "shapes"))
    yield stand_in
    stand_in.close()


@pytest.fixture
def started(hub: HubStandIn, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Settings]:
    """A server that start.sh would have launched."""
    settings = make_settings(free_port(), start_deadline_s=STILL_S, confirm_runs=1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLM_")} | {
        "GLM_API_PORT": str(settings.api_port), "GLM_API_HOST": "127.0.0.1", "GLM_LOG_DIR": str(settings.log_dir),
        "GLM_MODEL": "owner/shapes", "GLM_DEVICE": "cpu", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def service(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "deploy.service", *arguments], cwd=ROOT, env=environment, check=True)

    service("launch", str(settings.log_dir), "api", str(settings.api_port))
    yield settings
    hub.released.set()
    service("stop", str(settings.log_dir), "5", f"api={settings.api_port}")


def test_a_load_of_many_deadlines_is_never_ill_while_it_moves(hub: HubStandIn, started: Settings) -> None:
    """A run each second for three deadlines: with the deadline of 300 s, a run each half minute for 15 minutes."""
    hub.rate = hub.total / (3 * STILL_S)
    process, began = processes.read_record(started.log_dir, "api"), time.monotonic()
    rules, decisions, waited_s = set(), set(), 0.0

    while (api := check.run(started, random.Random(1)).report["targets"]["api"])["word"] == "starting":
        assert time.monotonic() - began < LIMIT_S, api
        rules.add(api["rule"])
        decisions.add(api["decision"]["kind"])
        waited_s = time.monotonic() - began
        time.sleep(1.0)

    assert "loading" in rules and "loading_stands_still" not in rules
    assert decisions == {"none"}
    assert waited_s > 2.5 * STILL_S
    assert processes.read_record(started.log_dir, "api") == process
    assert hub.sent >= hub.total


def test_a_load_that_stands_still_is_ill(hub: HubStandIn, started: Settings) -> None:
    hub.faults = [Fault("stall", after=1_000_000, times=99)]
    began = time.monotonic()

    while (api := check.run(started, random.Random(1)).report["targets"]["api"])["word"] != "broken":
        assert time.monotonic() - began < LIMIT_S, api
        time.sleep(1.0)

    assert api["rule"] == "loading_stands_still"
    assert api["decision"]["kind"] != "none"
