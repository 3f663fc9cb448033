"""Restarts with the real start.sh and real signals, on quick stand-in servers in a copy of the project."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ports import free_port

import settings as settings_module
from monitor import check
from monitor.act import interrupted_restart, operator_requests
from monitor.act.preflight import why_futile
from monitor.act.restart import Restarter
from monitor.judge.api_rules import judge_api
from monitor.judge.evidence import ApiEvidence, HealthReply, Identity, Moment, Observation, SelfReport
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Limits, Verdict
from monitor.observe import observe as observe_module
from monitor.observe import processes
from monitor.observe.observe import ProbePlan, now, observe
from monitor.store.state import CheckerState
from monitor.store.store import Store
from settings import Settings

ROOT = Path(__file__).resolve().parents[3]
COPIED = ("start.sh", "stop.sh", "cgroup.py", "log_output.py", "settings.py", "requirements.txt", "deploy", "monitor", "models/shapes/pictures.py")
DEAD = Verdict("api", "dead", "process_gone", "gone", "没了", cure=True)
WEDGED = Verdict("api", "wedged", "no_progress", "hangs", "卡住", cure=True)


class Project:
    """A project folder with stand-in servers, and the checker's view of it."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.settings = root, settings
        self.store = Store.open(settings.log_dir)
        self.state = CheckerState.load(self.store, now().boot_id)

    def start(self, part: str = "api") -> None:
        assert os.system(f"bash {self.root / 'start.sh'} {part} >{self.root / 'start.out'} 2>&1 </dev/null") == 0, (
            self.root / "start.out"
        ).read_text()

    def record(self, part: str = "api") -> processes.ProcessRecord:
        found = processes.read_record(self.settings.log_dir, part)
        assert found is not None
        return found

    def observe(self) -> Observation:
        observation = observe(self.settings, random.Random(1), ProbePlan(), now(), self.state.external_engine)
        observation.machine["load_per_core"] = 0.1  # whatever else this machine is doing
        return observation

    def restarter(self, seen: Observation | None = None) -> Restarter:
        return Restarter(self.settings, self.store, self.state, seen or self.observe(), None, self.root)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    root = tmp_path / "project"
    for name in COPIED:
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    shutil.copytree(ROOT / "tests" / "scripts" / "stand_in", root, dirs_exist_ok=True)
    ports = free_port(), free_port()
    values = {
        "GLM_API_HOST": "127.0.0.1", "GLM_WEB_HOST": "127.0.0.1", "GLM_API_PORT": str(ports[0]),
        "GLM_WEB_PORT": str(ports[1]), "GLM_LOG_DIR": str(root / "logs"), "GLM_DRAIN_S": "0", "GLM_START_TIMEOUT_S": "60",
        "CONDA_PREFIX": sys.prefix, "CONDA_DEFAULT_ENV": "tests",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(settings_module, "ENV_FILE", tmp_path / "no.env")
    # A whole run restarts in the project of the code; here it must be the copy.
    monkeypatch.setattr(Restarter.__init__, "__defaults__", (None, root))
    monkeypatch.setattr(processes, "ROOT", root)
    # The stand-ins answer no questions; a frozen one answers nothing.
    monkeypatch.setattr(observe_module, "SECOND_LOOK_LIMIT_S", 1.0)
    opened = Project(root, Settings(_env_file=None, probe_timeout_s=1))
    yield opened
    opened.store.close()
    for part in ("api", "web"):
        record = processes.read_record(opened.settings.log_dir, part)
        if record is not None:
            processes.end(record, 0)


def test_a_killed_process_is_restarted_and_counted(project):
    project.start()
    old = project.record()
    os.kill(old.pid, signal.SIGKILL)

    problem = project.restarter().restart("api", DEAD, Decision("restart", "dead"))

    assert problem == ""
    assert project.record().pid != old.pid and processes.is_running(project.record())
    assert len(CheckerState.load(project.store, "").limiters["api"].restarts) == 1, "on disk"
    (action,) = project.store.actions()
    assert (action["kind"], action["outcome"], action["actor"]) == ("restart", "done", "checker")


def test_a_restart_by_a_person_is_no_crash(project):
    project.start()
    processes.begin_restart(project.settings.log_dir, "api", os.getpid(), 60)
    old = project.record()
    os.kill(old.pid, signal.SIGKILL)
    while processes.is_running(old):
        time.sleep(0.01)

    verdict = judge_api(project.observe().api, Limits())
    refused = project.restarter().restart("api", DEAD, Decision("restart", "dead"))

    assert (verdict.word, verdict.rule, verdict.cure) == ("starting", "restarting", False)
    assert "a person restarts it" in refused and project.record() == old
    assert project.state.limiters["api"].restarts == (), "not counted"


def test_a_start_that_was_killed_blinds_the_checker_no_longer(project):
    project.start()
    log_dir, old = project.settings.log_dir, project.record()
    os.kill(old.pid, signal.SIGKILL)
    while processes.is_running(old):
        time.sleep(0.01)
    killed = os.spawnvp(os.P_NOWAIT, "sleep", ["sleep", "600"])
    processes.begin_restart(log_dir, "api", killed, 60)
    assert processes.is_restarting(log_dir, "api")

    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert judge_api(project.observe().api, Limits()).rule == "process_gone"
    processes.begin_restart(log_dir, "api", os.getpid(), -1)
    assert judge_api(project.observe().api, Limits()).rule == "process_gone", "it is overdue"


def test_what_a_person_has_started_anew_meanwhile_is_left_alone(project):
    project.start()
    os.kill(project.record().pid, signal.SIGKILL)
    seen = project.observe()
    assert judge_api(seen.api, Limits()).rule == "process_gone"
    project.start()
    new = project.record()

    assert "a person restarts it" in project.restarter(seen).restart("api", DEAD, Decision("restart", "dead"))
    assert processes.is_running(new)


def test_a_frozen_process_is_ended_with_its_children_and_replaced(project, monkeypatch):
    monkeypatch.setenv("STAND_IN_API", "parent")
    project.start()
    old = project.record()
    deadline = time.monotonic() + 20
    while len(processes.members(old)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = processes.members(old)
    assert len(children) == 2
    os.kill(old.pid, signal.SIGSTOP)
    seen = project.observe()
    assert seen.api.process.state == "stopped"

    assert project.restarter(seen).restart("api", WEDGED, Decision("restart", "frozen")) == ""

    assert processes.members(old) == []
    assert not any(Path(f"/proc/{pid}").exists() and processes.read_stat(pid).running for pid in children)
    assert project.record().pid != old.pid


def test_the_evidence_is_saved_before_the_process_is_ended(project):
    project.start()
    project.restarter().restart("api", WEDGED, Decision("restart", "wedged"))

    (folder,) = (project.settings.log_dir / "incidents").glob("*/1")
    names = {path.name for path in folder.iterdir()}
    assert {"evidence.json", "log.txt", "runs.json", "process.txt", "stacks.txt"} <= names
    assert "SIGUSR1, which would kill it" in (folder / "stacks.txt").read_text(), "a process without a handler is not signalled"
    assert json.loads((folder / "evidence.json").read_text())["verdict"]["rule"] == "no_progress"


def test_a_failed_start_is_reported_and_tried_again_by_the_next_run(project, monkeypatch):
    project.start()
    os.kill(project.record().pid, signal.SIGKILL)
    monkeypatch.setenv("STAND_IN_API", "die")

    problem = project.restarter().restart("api", DEAD, Decision("restart", "dead"))

    assert "there is no such model" in problem
    assert project.observe().api.process.state == "gone", "still recorded, so the next run tries again"
    assert project.store.actions()[0]["outcome"] == "failed"
    assert len(project.state.limiters["api"].restarts) == 1, "a failed start counts"


def test_the_reason_of_a_failed_start_is_in_the_next_verdict_until_one_succeeds(project, monkeypatch):
    monkeypatch.setenv("STAND_IN_API", "die")
    with pytest.raises(AssertionError):
        project.start()

    verdict = judge_api(project.observe().api, Limits())

    assert verdict.rule == "not_started"
    assert "The API exited right after it was started. Last line of api.log: there is no such model: nowhere/at-all" in verdict.en
    assert verdict.facts["start_failure"] in verdict.zh
    monkeypatch.delenv("STAND_IN_API")
    project.start()
    assert os.system(f"bash {project.root / 'stop.sh'} >/dev/null 2>&1") == 0
    assert not project.observe().api.process.start_failure


def test_a_cure_installs_nothing(project, monkeypatch):
    """The project's environment misses a package; a person's start.sh would install it."""
    project.start()
    (project.root / "requirements.txt").write_text("no-such-package-as-this==1.0\n")
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "glm-env")  # the environment that start.sh fills
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    os.kill(project.record().pid, signal.SIGKILL)

    problem = project.restarter().restart("api", DEAD, Decision("restart", "dead"))

    assert problem == ""
    assert processes.is_running(project.record())


def test_another_process_on_the_port_is_left_alone(project):
    project.start()
    record = project.record()
    os.kill(record.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes.is_running(record) and time.monotonic() < deadline:
        time.sleep(0.05)
    with socket.create_server(("127.0.0.1", record.port)):
        seen = project.observe()
        problem = project.restarter(seen).restart("api", DEAD, Decision("restart", "dead"))

    assert seen.api.process.port_owner == "stranger"
    assert "the port is held by" in problem and str(os.getpid()) in problem
    assert project.store.actions()[0]["outcome"] == "refused"
    assert project.state.limiters["api"].restarts == (), "a refused restart does not count"


def test_a_whole_run_restarts_and_reports_it(project):
    """From cron's point of view: dead in one run, and the same run starts it again."""
    project.start("api")
    os.kill(project.record().pid, signal.SIGKILL)

    outcome = check.run(project.settings, random.Random(1))

    assert [row["outcome"] for row in project.store.actions()] == ["done"]
    assert project.store.incidents()[0]["rule"] == "process_gone"
    assert processes.is_running(project.record())
    assert outcome.report["targets"]["api"]["restarts_last_day"] == 1


@pytest.mark.parametrize("loss", ["deleted", "damaged"])
def test_a_process_killed_with_its_pid_file_lost_is_restarted(project, loss):
    project.start()
    old = project.record()
    check.run(project.settings, random.Random(1))
    path = processes.record_path(project.settings.log_dir, "api")
    path.unlink() if loss == "deleted" else path.write_text("{")
    os.kill(old.pid, signal.SIGKILL)

    check.run(project.settings, random.Random(1))

    assert project.store.incidents()[0]["rule"] == "process_gone"
    assert project.record().pid != old.pid and processes.is_running(project.record())


def test_the_checker_of_a_copied_folder_leaves_the_originals_servers_alone(project, monkeypatch):
    project.start()
    check.run(project.settings, random.Random(1))  # so that the copy has the checker's memory too
    original = project.record()
    copy = project.root.parent / "copy"
    shutil.copytree(project.root, copy)
    settings = project.settings.model_copy(update={"log_dir": copy / "logs", "api_port": free_port(), "web_port": free_port()})

    with monkeypatch.context() as patched:  # not until the project stops its own servers, which it would not find
        patched.setattr(processes, "ROOT", copy)
        report = check.run(settings, random.Random(1)).report

    assert report["targets"]["api"]["rule"] == "not_started"
    assert report["targets"]["api"]["decision"]["kind"] == "none"
    assert processes.is_running(original)


def test_what_is_stopped_between_the_verdict_and_the_restart_stays_stopped(project):
    project.start()
    old = project.record()
    restarter = project.restarter()
    processes.mark_stopped(project.settings.log_dir, "api", "stop.sh")
    os.kill(old.pid, signal.SIGKILL)

    assert "stopped on purpose" in restarter.restart("api", DEAD, Decision("restart", "dead"))

    assert project.observe().api.process.state == "unrecorded", "its pid file is not yet removed, but it has not crashed"
    assert project.state.limiters["api"].restarts == ()
    assert restarter.restart("api", DEAD, Decision("restart", "asked"), "ann") == "", "an operator may start it again"
    assert processes.is_running(project.record()) and not processes.was_stopped(project.settings.log_dir, "api")


def test_what_was_stopped_on_purpose_is_not_started(project):
    project.start()
    check.run(project.settings, random.Random(1))
    processes.record_path(project.settings.log_dir, "api").unlink()
    assert os.system(f"bash {project.root / 'stop.sh'} >/dev/null 2>&1") == 0

    outcome = check.run(project.settings, random.Random(1))

    assert outcome.report["targets"]["api"]["rule"] == "not_started"
    assert project.store.actions() == []


def test_shadow_only_records_the_restart(project):
    project.start()
    old = project.record()
    os.kill(old.pid, signal.SIGKILL)

    check.run(project.settings.model_copy(update={"cure": "shadow"}), random.Random(1))

    assert [row["kind"] for row in project.store.actions()] == ["shadow"]
    assert project.record() == old


def test_pause_suspends_restarts_from_the_next_run(project):
    project.start()
    os.kill(project.record().pid, signal.SIGKILL)
    project.store.add_request(time.time(), "ann", "pause", "", {"until": None, "reason": "looking into it"})

    report = check.run(project.settings, random.Random(1)).report

    assert report["targets"]["api"]["decision"]["kind"] == "hold"
    assert "looking into it" in report["check"]["hold"]
    assert [row["kind"] for row in project.store.actions()] == ["hold", "pause"]


def test_an_operators_restart_and_drain_are_carried_out_and_audited(project):
    project.start()
    old = project.record()
    number = project.store.add_request(time.time(), "ann", "restart", "api")
    check.run(project.settings, random.Random(1))
    assert project.record().pid != old.pid
    assert project.store.rows("SELECT state FROM requests WHERE id = ?", number) == [{"state": "done"}]

    project.store.add_request(time.time(), "ann", "drain", "api")
    project.store.add_request(time.time(), "ann", "restart", "the moon")
    check.run(project.settings, random.Random(1))

    assert processes.read_record(project.settings.log_dir, "api") is None
    assert check.run(project.settings, random.Random(1)).report["targets"]["api"]["rule"] == "not_started"
    newest = project.store.requests()
    assert [row["state"] for row in newest[:2]] == ["refused", "done"]
    assert "`target` must be one of" in newest[0]["outcome"]
    assert {row["actor"] for row in project.store.actions()} == {"ann"}


def test_an_old_request_is_refused_and_an_interrupted_one_has_failed(project):
    project.store.add_request(time.time() - 7200, "ann", "restart", "api")
    project.store.add_request(time.time(), "ann", "pause")
    project.store.execute("UPDATE requests SET state = 'running' WHERE kind = 'pause'")

    assert operator_requests.take(project.store, time.time()) == []

    assert {row["kind"]: row["state"] for row in project.store.requests()} == {"restart": "refused", "pause": "failed"}


def seen_with(project: Project, machine: dict | None = None, gpu: dict | None = None) -> Observation:
    seen = project.observe()
    return Observation(
        seen.moment, seen.api, seen.page, {"disks": [{"path": "/l", "free_mib": 9000}], **(machine or {})},
        {"gpus": [], "hung": False, "reason": "none", **(gpu or {})},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "gpu", "cards", "reason"),
    [
        ({"disks": [{"path": "/l", "free_mib": 10}]}, {}, 0, "is full"),
        ({}, {"hung": True}, 0, "driver does not answer"),
        ({}, {}, 1, "0 of 1 GPUs are visible"),
        ({}, {"gpus": [{"index": 0, "throttle_hardware": True}]}, 1, "throttled"),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 90.0}, {}, 0, "overloaded"),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 3.0}, {}, 0, ""),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 90.0, "process": {"waits_for_processor": 0.9}}, {}, 0, "overloaded"),
        ({"load_per_core": 9.0, "cpu_pressure_percent": 90.0, "process": {"waits_for_processor": 0.01}}, {}, 0, ""),
        ({}, {}, 0, ""),
    ],
)
def test_a_restart_that_cannot_help_is_refused(project, machine, gpu, cards, reason):
    found = why_futile(WEDGED, seen_with(project, machine, gpu), cards)

    assert (reason in found) if reason else found == ""


@pytest.mark.parametrize("started", [False, True])
def test_a_restart_whose_checker_was_killed_is_counted_if_it_started_something(project, monkeypatch, started):
    project.start()
    os.kill(project.record().pid, signal.SIGKILL)
    restarter = project.restarter()
    monkeypatch.setattr(restarter, "_audit", lambda *_: None)  # where the checker is killed
    if not started:
        monkeypatch.setattr(restarter, "_start", lambda *_: "")
    restarter.restart("api", DEAD, Decision("restart", "dead"))
    state = CheckerState.load(project.store, "")
    assert len(state.limiters["api"].restarts) == 1

    first = interrupted_restart.settle(project.store, state, project.settings, None, project.root)
    again = interrupted_restart.settle(project.store, state, project.settings, None, project.root)

    after = CheckerState.load(project.store, "").limiters["api"]
    assert (len(after.restarts), after.step) == ((1, 1) if started else (0, 0)), "nothing delays the restart that is still due"
    assert ("new process" in first) is started and again == ""
    (action,) = project.store.actions()
    assert (action["kind"], action["outcome"]) == ("restart", "done" if started else "interrupted")


def test_the_start_of_a_killed_checker_is_waited_for(project):
    with (project.root / "logs" / "start.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        interrupted_restart.wait_for_start(project.root, 0.5)
        assert time.monotonic() - began >= 0.5
    began = time.monotonic()
    interrupted_restart.wait_for_start(project.root, 30.0)
    assert time.monotonic() - began < 15


def test_draining_is_timed_by_process_across_runs():
    one, two = (HealthReply("answered", state="draining", report=SelfReport(Identity(pid, 5, "boot"))) for pid in (1, 2))
    first = Moment(9.0, 100.0, "boot")
    later = replace(first, monotonic=190.0)
    kept = observe_module.draining_of(ApiEvidence("", first=one, draining_s=observe_module._draining_s(one, {}, first)), first)

    assert kept["since"] == 100.0
    assert observe_module._draining_s(one, kept, later) == 90.0
    assert observe_module._draining_s(two, kept, later) == 0.0, "a new process"
    assert observe_module._draining_s(replace(one, state="idle"), kept, later) is None
