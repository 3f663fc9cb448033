"""The cure, with the real start.sh and the real signals, on quick stand-in servers in a copy of the project."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import settings as settings_module
from monitor import check
from monitor.act import operator_requests
from monitor.act.preflight import why_futile
from monitor.act.restart import Restarter
from monitor.judge.evidence import Observation
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict
from monitor.observe import processes
from monitor.observe.observe import ProbePlan, now, observe
from monitor.store.memory import remember
from monitor.store.store import Store
from settings import Settings

ROOT = Path(__file__).resolve().parents[3]
COPIED = ("start.sh", "stop.sh", "cgroup.py", "settings.py", "requirements.txt", "deploy", "monitor", "models/shapes/pictures.py")
DEAD = Verdict("api", "dead", "process_gone", "gone", "没了", cure=True)
WEDGED = Verdict("api", "wedged", "no_progress", "hangs", "卡住", cure=True)


class Place:
    """A project folder with stand-in servers, and the checker's view of it."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.settings = root, settings
        self.store = Store.open(settings.log_dir)
        self.memory = remember(self.store, now().boot_id)

    def start(self, part: str = "api") -> None:
        assert os.system(f"bash {self.root / 'start.sh'} {part} >{self.root / 'start.out'} 2>&1 </dev/null") == 0, (
            self.root / "start.out"
        ).read_text()

    def record(self, part: str = "api") -> processes.ProcessRecord:
        found = processes.read_record(self.settings.log_dir, part)
        assert found is not None
        return found

    def look(self) -> Observation:
        seen = observe(self.settings, random.Random(1), ProbePlan(), now(), self.memory.external_engine)
        seen.machine["load_per_core"] = 0.1  # whatever else this machine is doing just now
        return seen

    def restarter(self, seen: Observation | None = None) -> Restarter:
        return Restarter(self.settings, self.store, self.memory, seen or self.look(), None, self.root)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    root = tmp_path / "project"
    for name in COPIED:
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    shutil.copytree(ROOT / "tests" / "scripts" / "stand_in", root, dirs_exist_ok=True)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    values = {
        "GLM_API_HOST": "127.0.0.1", "GLM_WEB_HOST": "127.0.0.1", "GLM_API_PORT": str(ports[0]),
        "GLM_WEB_PORT": str(ports[1]), "GLM_LOG_DIR": str(root / "logs"), "GLM_DRAIN_S": "0", "GLM_START_TIMEOUT_S": "60",
        "CONDA_PREFIX": sys.prefix, "CONDA_DEFAULT_ENV": "tests",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(settings_module, "ENV_FILE", tmp_path / "no.env")
    # A whole run finds the project by itself; here it must find the copy.
    monkeypatch.setattr(Restarter.__init__, "__defaults__", (None, root))
    found = Place(root, Settings(_env_file=None, probe_timeout_s=2))
    yield found
    found.store.close()
    for part in ("api", "web"):
        record = processes.read_record(found.settings.log_dir, part)
        if record is not None:
            processes.end(record, 0)


def test_a_killed_process_is_started_anew_and_counted(place):
    place.start()
    old = place.record()
    os.kill(old.pid, signal.SIGKILL)

    problem = place.restarter().restart("api", DEAD, Decision("restart", "dead"))

    assert problem == ""
    assert place.record().pid != old.pid and processes.is_running(place.record())
    assert len(remember(place.store, "").limiters["api"].restarts) == 1, "on disk"
    (action,) = place.store.actions()
    assert (action["kind"], action["outcome"], action["actor"]) == ("restart", "done", "checker")


def test_a_frozen_process_is_ended_with_its_children_and_replaced(place, monkeypatch):
    monkeypatch.setenv("STAND_IN_API", "parent")
    place.start()
    old = place.record()
    deadline = time.monotonic() + 20
    while len(processes.members(old)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = processes.members(old)
    assert len(children) == 2
    os.kill(old.pid, signal.SIGSTOP)
    seen = place.look()
    assert seen.api.process.state == "stopped"

    assert place.restarter(seen).restart("api", WEDGED, Decision("restart", "frozen")) == ""

    assert processes.members(old) == []
    assert not any(Path(f"/proc/{pid}").exists() and processes.read_stat(pid).running for pid in children)
    assert place.record().pid != old.pid


def test_the_evidence_is_saved_before_the_end(place):
    place.start()
    place.restarter().restart("api", WEDGED, Decision("restart", "wedged"))

    (folder,) = (place.settings.log_dir / "incidents").glob("*/1")
    names = {path.name for path in folder.iterdir()}
    assert {"evidence.json", "log.txt", "runs.json", "process.txt", "stacks.txt"} <= names
    assert "SIGUSR1, which would end it" in (folder / "stacks.txt").read_text(), "a process without a handler is spared"
    assert json.loads((folder / "evidence.json").read_text())["verdict"]["rule"] == "no_progress"


def test_a_start_that_fails_is_told_and_the_wish_remains(place, monkeypatch):
    place.start()
    os.kill(place.record().pid, signal.SIGKILL)
    monkeypatch.setenv("STAND_IN_API", "die")

    problem = place.restarter().restart("api", DEAD, Decision("restart", "dead"))

    assert "there is no such model" in problem
    assert place.look().api.process.state == "gone", "still wanted, so the next run tries again"
    assert place.store.actions()[0]["outcome"] == "failed"
    assert len(place.memory.limiters["api"].restarts) == 1, "a failed start counts"


def test_a_stranger_on_the_port_is_left_alone(place):
    place.start()
    record = place.record()
    os.kill(record.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes.is_running(record) and time.monotonic() < deadline:
        time.sleep(0.05)
    with socket.create_server(("127.0.0.1", record.port)):
        seen = place.look()
        problem = place.restarter(seen).restart("api", DEAD, Decision("restart", "dead"))

    assert seen.api.process.port_owner == "stranger"
    assert "the port is held by" in problem and str(os.getpid()) in problem
    assert place.store.actions()[0]["outcome"] == "refused"
    assert place.memory.limiters["api"].restarts == (), "what was not tried does not count"


def test_a_whole_run_cures_and_says_so(place):
    """From cron's point of view: dead in one run, and the same run starts it again."""
    place.start("api")
    os.kill(place.record().pid, signal.SIGKILL)

    outcome = check.run(place.settings, random.Random(1))

    assert [row["outcome"] for row in place.store.actions()] == ["done"]
    assert place.store.incidents()[0]["rule"] == "process_gone"
    assert processes.is_running(place.record())
    assert outcome.report["targets"]["api"]["restarts_last_day"] == 1


def test_what_was_stopped_on_purpose_is_not_started(place):
    place.start()
    assert os.system(f"bash {place.root / 'stop.sh'} >/dev/null 2>&1") == 0

    outcome = check.run(place.settings, random.Random(1))

    assert outcome.report["targets"]["api"]["rule"] == "not_started"
    assert place.store.actions() == []


def test_shadow_only_writes_down_what_it_would_do(place):
    place.start()
    old = place.record()
    os.kill(old.pid, signal.SIGKILL)

    check.run(place.settings.model_copy(update={"cure": "shadow"}), random.Random(1))

    assert [row["kind"] for row in place.store.actions()] == ["shadow"]
    assert place.record() == old


def test_pause_holds_the_cure_from_the_very_next_run_on(place):
    place.start()
    os.kill(place.record().pid, signal.SIGKILL)
    place.store.ask(time.time(), "ann", "pause", "", {"until": None, "reason": "looking into it"})

    report = check.run(place.settings, random.Random(1)).report

    assert report["targets"]["api"]["decision"]["kind"] == "hold"
    assert "looking into it" in report["check"]["hold"]
    assert [row["kind"] for row in place.store.actions()] == ["hold", "pause"]


def test_an_operators_restart_and_drain_are_carried_out_and_audited(place):
    place.start()
    old = place.record()
    number = place.store.ask(time.time(), "ann", "restart", "api")
    check.run(place.settings, random.Random(1))
    assert place.record().pid != old.pid
    assert place.store.rows("SELECT state FROM requests WHERE id = ?", number) == [{"state": "done"}]

    place.store.ask(time.time(), "ann", "drain", "api")
    place.store.ask(time.time(), "ann", "restart", "the moon")
    check.run(place.settings, random.Random(1))

    assert processes.read_record(place.settings.log_dir, "api") is None
    newest = place.store.requests()
    assert [row["state"] for row in newest[:2]] == ["refused", "done"]
    assert "`target` must be one of" in newest[0]["outcome"]
    assert {row["actor"] for row in place.store.actions()} == {"ann"}


def test_an_old_wish_is_refused_and_one_cut_short_is_failed(place):
    place.store.ask(time.time() - 7200, "ann", "restart", "api")
    place.store.ask(time.time(), "ann", "pause")
    place.store.execute("UPDATE requests SET state = 'running' WHERE kind = 'pause'")

    assert operator_requests.take(place.store, time.time()) == []

    assert {row["kind"]: row["state"] for row in place.store.requests()} == {"restart": "refused", "pause": "failed"}


def seen_with(place: Place, machine: dict | None = None, gpu: dict | None = None) -> Observation:
    seen = place.look()
    return Observation(
        seen.moment, seen.api, seen.page, {"disks": [{"path": "/l", "free_mib": 9000}], **(machine or {})},
        {"gpus": [], "hung": False, "reason": "none", **(gpu or {})},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "gpu", "cards", "says"),
    [
        ({"disks": [{"path": "/l", "free_mib": 10}]}, {}, 0, "is full"),
        ({}, {"hung": True}, 0, "driver does not answer"),
        ({}, {}, 1, "0 of 1 GPUs can be seen"),
        ({}, {"gpus": [{"index": 0, "throttle_hardware": True}]}, 1, "throttled"),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 90.0}, {}, 0, "overloaded"),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 3.0}, {}, 0, ""),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 90.0, "process": {"waits_for_processor": 0.9}}, {}, 0, "overloaded"),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 90.0, "process": {"waits_for_processor": 0.01}}, {}, 0, ""),
        ({}, {}, 0, ""),
    ],
)
def test_would_a_restart_help(place, machine, gpu, cards, says):
    reason = why_futile(WEDGED, seen_with(place, machine, gpu), cards)

    assert (says in reason) if says else reason == ""
