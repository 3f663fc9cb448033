"""Climbs the ladder of cures for an API that computes wrongly: one rung a run, each with an audit row and a check at once.

A rung that the running API cannot do (an older version, no probe token, no answer) gives way to the next one in the same run.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass

from monitor.act.lock import Lock
from monitor.act.restart import MARGIN_S, Restarter
from monitor.judge import accuracy, ladder
from monitor.judge.evidence import Answer
from monitor.judge.ladder import Step
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict
from monitor.observe import api_probe, health_probe
from monitor.observe.http_exchange import exchange
from monitor.store.state import CheckerState
from monitor.store.store import Store
from settings import Settings

CONTROL_LIMIT_S = {ladder.DROP_CACHES: 30.0, ladder.RELOAD_WEIGHTS: 300.0, "fingerprint": 60.0}
HEALTH_LIMIT_S = 5.0


@dataclass(frozen=True)
class Check:
    """What an API answered right after a rung. `nonfinite_total`: its count of requests with values that are not finite."""

    good: bool
    words: str
    nonfinite_total: int | None = None


class Cure:
    """Carries out the rungs of one run. `climbed`: the rungs that changed something, which must be looked at again."""

    def __init__(self, settings: Settings, store: Store, state: CheckerState, restarter: Restarter, rng: random.Random, lock: Lock | None = None) -> None:
        self._settings = settings
        self._store = store
        self._state = state
        self._restarter = restarter
        self._rng = rng
        self._lock = lock
        self.climbed: list[str] = []

    def carry_out(self, target: str, verdict: Verdict, decision: Decision) -> None:
        """Does what was decided: a rung of the ladder, or a restart as such."""
        if decision.kind in ladder.CONTROL:
            self._climb(verdict, decision)
        elif decision.kind == "restart" and ladder.applies(verdict):
            self._restart(verdict, decision)
        elif decision.kind == "restart":
            self._restarter.restart(target, verdict, decision)
        elif decision.tells:
            self._note(Step(ladder.PERSON, time.time(), "done", 0.0, decision.reason), None)

    def _climb(self, verdict: Verdict, decision: Decision) -> None:
        for rung in ladder.RUNGS[ladder.RUNGS.index(decision.kind) :]:
            if rung == ladder.RESTART:
                self._restart(verdict, decision)
                return
            began = time.monotonic()
            problem, cannot = self._control(rung)
            if cannot:
                self._note(Step(rung, time.time(), "impossible", round(time.monotonic() - began, 2), problem), None)
                continue
            check = self._look() if not problem else Check(False, problem)
            outcome = "done" if check.good else "failed"
            spent_s = round(time.monotonic() - began, 2)
            detail = f"{decision.reason}; in {spent_s:.1f} s; after it: {check.words}"
            self._note(Step(rung, time.time(), outcome, spent_s, detail), check.nonfinite_total)
            self.climbed.append(rung)
            return

    def _restart(self, verdict: Verdict, decision: Decision) -> None:
        began = time.monotonic()
        problem = self._restarter.restart("api", verdict, decision)  # has its own audit row
        spent_s = round(time.monotonic() - began, 2)
        outcome, detail = ("failed", problem) if problem else ("done", decision.reason)
        self._keep(Step(ladder.RESTART, time.time(), outcome, spent_s, detail[:300]), None)

    def _control(self, action: str) -> tuple[str, bool]:
        """(why it failed, whether the API cannot do it at all); ("", False) once the engine has done it."""
        token = self._settings.probe_token
        if token is None:
            return "no GLM_PROBE_TOKEN is set", True
        limit_s = CONTROL_LIMIT_S[action]
        if self._lock is not None:
            self._lock.extend(limit_s + MARGIN_S, action)
        headers = {"Content-Type": "application/json", api_probe.PROBE_HEADER: token.get_secret_value()}
        if self._settings.api_key is not None:
            headers["Authorization"] = f"Bearer {self._settings.api_key.get_secret_value()}"
        reply = exchange(f"{self._settings.api_base_url}/control", limit_s, "POST", json.dumps({"action": action}).encode(), headers)
        if reply.outcome == "answered" and reply.status == 200 and (reply.json() or {}).get("done") is True:
            return "", False
        if reply.outcome == "answered" and 400 <= reply.status < 500:
            return f"the API refuses {action} (HTTP {reply.status})", True
        return reply.detail or f"HTTP {reply.status} to {action}", False

    def _look(self) -> Check:
        """A real question, and the API's own fingerprint taken anew."""
        answer = self._ask()
        took_fingerprint = self._control("fingerprint") == ("", False)
        token = self._settings.probe_token
        reply = health_probe.get_health(self._settings.api_base_url, HEALTH_LIMIT_S, token.get_secret_value() if token else "")
        corrupt = reply.report.corrupt
        fingerprint = corrupt.fingerprint if took_fingerprint and corrupt is not None else ""
        words = f"a {answer.kind} question was answered {answer.outcome}" + (f" ({answer.detail})" if answer.detail else "")
        words += f", the fingerprint is {fingerprint or 'unknown'}"
        good = answer.outcome in ("right", "unjudged") and fingerprint != "differs"
        return Check(good, words, corrupt.nonfinite_total if corrupt is not None else None)

    def _ask(self) -> Answer:
        key, token = self._settings.api_key, self._settings.probe_token
        prober = api_probe.Prober(
            self._settings.api_base_url, key.get_secret_value() if key else "", token.get_secret_value() if token else "", self._rng,
            accuracy=self._state.accuracy,
        )  # fmt: skip
        answer = prober.ask_image(self._settings.probe_timeout_s)
        return prober.ask_text(self._settings.probe_timeout_s) if answer.outcome == "skipped" else answer

    def _note(self, step: Step, seen: int | None) -> None:
        incident = self._state.histories["api"].incident
        with self._store.transaction():
            self._store.add_action(step.at, "api", step.rung, "checker", step.outcome, step.detail, incident.id if incident else "", step.seconds)
        self._keep(step, seen)

    def _keep(self, step: Step, seen: int | None) -> None:
        """Stored at once: a checker that is killed in the next rung must not begin again with the first."""
        self._state.ladder = ladder.took(self._state.ladder, step, seen)
        if step.rung in ladder.CONTROL and step.outcome != "impossible":
            self._state.accuracy = accuracy.after_restart(self._state.accuracy)
        with self._store.transaction():
            self._state.save(self._store)
