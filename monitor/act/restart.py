"""Restarts one target: preflight, evidence bundle, drain, end by identity, wait for port and GPU, start.sh.

The next observation verifies the result. The restart is counted in the store before the new process starts, so the count
survives a checker that is killed here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import settings
from monitor.act import evidence_bundle, interrupted_restart, preflight
from monitor.act.lock import Lock
from monitor.act.replica_turn import taking_turns
from monitor.judge import accuracy, engine_rules, history, limiter
from monitor.judge.evidence import Observation
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict
from monitor.observe import gpu, ports, processes
from monitor.observe.observe import now
from monitor.store.state import WITH_FRONT, CheckerState
from monitor.store.store import Store
from settings import ROOT, Settings

BUNDLE_S, PORT_WAIT_S, GPU_WAIT_S, MARGIN_S = 10.0, 10.0, 20.0, 60.0
AUTOMATIC = ("checker", "nightly")  # actors that start nothing that was stopped on purpose
RESTARTED_MEANWHILE = "a person restarts it with start.sh, or has just done so"
STOPPED_MEANWHILE = "it was stopped on purpose meanwhile"
HUNG_GRACE_S = 5.0  # a process with a blocked event loop cannot drain


class Restarter:
    """Restarts and drains of one run, each with an audit row. `root`: the folder of start.sh. `environment`: of start.sh."""

    def __init__(
        self, settings: Settings, store: Store, state: CheckerState, observation: Observation, lock: Lock | None = None,
        root: Path = ROOT, *, environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._store = store
        self._state = state
        self._observation = observation
        self._lock = lock
        self._root = root
        self._environment = environment
        self.restarted: list[str] = []

    def restart(self, target: str, verdict: Verdict, decision: Decision, actor: str = "checker") -> str:
        """Empty if a new process was started; otherwise why not. Adds an audit row in both cases.

        A replica is restarted while no other one is: a person waits for that, the checker tries again in its next run. What is dead
        serves nobody, and need not wait.
        """
        if self._settings.replica is None or target != "api" or verdict.word == "dead":
            return self._restart(target, verdict, decision, actor)
        wait_s = 0.0 if actor == "checker" else self._settings.start_deadline_s
        if self._lock is not None:
            self._lock.extend(wait_s + self._longest_s() + self._settings.start_deadline_s, f"restarting replica {self._settings.replica}")
        with taking_turns(self._settings, wait_s) as busy:
            if busy:
                self._audit(target, "restart", actor, "refused", busy, "", time.monotonic())
                return busy
            return self._restart(target, verdict, decision, actor)

    def _longest_s(self) -> float:
        return self._settings.stop_s + self._settings.start_timeout_s + GPU_WAIT_S + PORT_WAIT_S + BUNDLE_S + MARGIN_S

    def _restart(self, target: str, verdict: Verdict, decision: Decision, actor: str) -> str:
        began = time.monotonic()
        futile = preflight.why_futile(verdict, self._observation, int(self._store.get("cards_expected", 0)))
        incident = self._state.histories[target].incident
        name = incident.id if incident else f"{int(time.time())}-{target}-{actor}"
        if futile:
            self._audit(target, "restart", actor, "refused", f"a restart would not help: {futile}", name, began)
            return futile
        part = verdict.part or WITH_FRONT[target]
        if self._is_restarted(target, part):
            self._audit(target, "restart", actor, "refused", RESTARTED_MEANWHILE, name, began)
            return RESTARTED_MEANWHILE
        if self._lock is not None:
            self._lock.extend(self._longest_s(), f"restarting {target}")
        evidence = self._observation.api.to_dict() | {"verdict": vars(verdict)}
        saved = evidence_bundle.save(self._settings, name, part, evidence, self._store.runs(time.time() - 3600, 30))
        if self._is_restarted(target, part):  # saving the evidence took a while
            self._audit(target, "restart", actor, "refused", RESTARTED_MEANWHILE, name, began)
            return RESTARTED_MEANWHILE
        problem = self._stop(part, verdict)
        if problem:
            self._audit(target, "restart", actor, "failed", problem, name, began)
            return problem
        automatic = actor in AUTOMATIC
        if automatic and processes.was_stopped_by_request(self._settings.log_dir, part):
            self._audit(target, "restart", actor, "refused", STOPPED_MEANWHILE, name, began)
            return STOPPED_MEANWHILE
        self._count(target, part)
        problem = self._start(part, automatic)
        detail = problem or f"{decision.reason}; evidence in {saved or 'none: the disk is not writable'}"
        self._audit(target, "restart", actor, "failed" if problem else "done", detail, name, began)
        if not problem:
            self.restarted.append(target)
        return problem

    def drain(self, target: str, actor: str) -> str:
        """Stops the target, and marks that, so that no later run restarts it. Empty if it was stopped, otherwise why not."""
        began = time.monotonic()
        part = WITH_FRONT[target]
        record = processes.read_record(self._settings.log_dir, part)
        if record is None:
            return f"the {target} was not started here"
        if self._lock is not None:
            self._lock.extend(self._settings.stop_s + MARGIN_S, f"draining {target}")
        with contextlib.suppress(OSError):  # of a full disk: `forget` makes the mark of the pid file
            processes.mark_stopped(self._settings.log_dir, part, f"drained by {actor}")
        left = processes.end(record, self._settings.stop_s + HUNG_GRACE_S)
        if left:
            processes.unmark_stopped(self._settings.log_dir, part)
            return f"processes {left} cannot be killed"
        processes.forget(self._settings.log_dir, part)
        self._audit(target, "drain", actor, "done", "stopped on request", "", began)
        return ""

    def _is_restarted(self, target: str, part: str) -> bool:
        """By a person, since the run has looked: what runs now is not what was judged, and ending it would spoil the restart."""
        if processes.is_restarting(self._settings.log_dir, part):
            return True
        of_part = {"api": self._observation.api, "page": self._observation.page, "front": self._observation.front}
        evidence = self._observation.api.engine if part == engine_rules.PART else of_part[target]
        judged = evidence.process if evidence is not None else None
        record = processes.read_record(self._settings.log_dir, part)
        if judged is None or judged.pid is None or record is None or record.pid == judged.pid:
            return False
        return processes.is_running(record)

    def _stop(self, part: str, verdict: Verdict) -> str:
        record = processes.read_record(self._settings.log_dir, part)
        if record is None:
            return ""
        held_mib = gpu.highest(self._observation.gpu.get("gpus") or [], "memory_used_mib")
        if processes.members(record):
            hung = verdict.word in ("zombie", "wedged")
            grace_s = HUNG_GRACE_S if hung else self._settings.stop_s + HUNG_GRACE_S
            left = processes.end(record, grace_s)
            if left:
                return f"processes {left} cannot be killed (uninterruptible sleep); reboot the machine"
        deadline = time.monotonic() + PORT_WAIT_S
        while ports.listeners(record.port) and time.monotonic() < deadline:
            time.sleep(0.1)
        others = ports.listeners(record.port)
        if others:
            return f"port {record.port} is held by {', '.join(other.describe() for other in others)}"
        if part in ("api", engine_rules.PART) and held_mib:
            self._wait_for_gpu(held_mib)
        return ""

    def _wait_for_gpu(self, held_mib: float) -> None:
        """The driver frees memory shortly after the process has ended; a process started earlier runs out of memory."""
        deadline = time.monotonic() + GPU_WAIT_S
        while time.monotonic() < deadline:
            used = gpu.highest(gpu.read()["gpus"], "memory_used_mib")
            if used is None or used < held_mib:
                return
            time.sleep(1.0)

    def _count(self, target: str, part: str) -> None:
        moment = now()
        self._state.limiters[target] = limiter.restarted(self._state.limiters[target], moment.wall)
        self._state.histories[target] = history.after_restart(self._state.histories[target], moment)
        if target == "api":
            self._state.accuracy = accuracy.after_restart(self._state.accuracy)
        with self._store.transaction():
            self._state.save(self._store)
            self._store.put(interrupted_restart.NAME, interrupted_restart.begun(part, moment.wall, self._settings.log_dir))

    def _start(self, part: str, automatic: bool) -> str:
        record = processes.read_record(self._settings.log_dir, part)
        name = part if self._settings.replica is None else f"{part}/{self._settings.replica}"
        limit_s = self._settings.start_timeout_s + MARGIN_S
        # start.sh chooses its own Python, which under cron may differ from this one.
        env = {**(environment_for_children() if self._environment is None else self._environment)}
        env["START_SH_NO_INSTALL"] = "1"  # a package index that hangs or has changed must not decide over a cure
        if automatic:
            env["START_SH_CURE"] = "1"  # start.sh starts nothing that is stopped on purpose meanwhile
        env["PATH"] = f"{env.get('PATH', '/usr/bin:/bin')}:/usr/local/bin:/usr/sbin"
        if "CONDA_PREFIX" not in env and (Path(sys.prefix) / "conda-meta").is_dir():
            env |= {"CONDA_PREFIX": sys.prefix, "CONDA_DEFAULT_ENV": Path(sys.prefix).name}
        try:
            done = subprocess.run(
                ["bash", str(self._root / "start.sh"), name], cwd=self._root, env=env, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s, start_new_session=True,
            )  # fmt: skip
            problem = "" if done.returncode == 0 else _last_lines(done.stdout, done.returncode)
        except subprocess.TimeoutExpired:
            problem = f"start.sh {name} did not finish within {limit_s:.0f} s"
        except OSError as error:
            problem = f"start.sh cannot be run: {error}"
        if problem and not processes.was_stopped_by_request(self._settings.log_dir, part):
            # start.sh undoes a failed start; with the pid file and without the mark, the next run tries again.
            processes.unmark_stopped(self._settings.log_dir, part)
            if record is not None and processes.read_record(self._settings.log_dir, part) is None:
                processes.write_record(self._settings.log_dir, part, record)
        return problem

    def _audit(self, target: str, kind: str, actor: str, outcome: str, detail: str, incident: str, began: float) -> None:
        spent_s = round(time.monotonic() - began, 2)
        with self._store.transaction():
            self._store.put(interrupted_restart.NAME, None)
            self._store.add_action(time.time(), target, kind, actor, outcome, detail, incident, spent_s)


def environment_for_children() -> dict[str, str]:
    """The environment of start.sh, which must read the settings that are in force here."""
    return {**os.environ, **settings.environment_for_children()}


def _last_lines(output: bytes, code: int) -> str:
    lines = [line for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    return f"start.sh failed with code {code}: " + " | ".join(lines[-6:])
