"""Carries out the operators' requests in the store: restarts, drains, probes, holds and resets.

The console and the command line only insert rows (`Store.add_request`); every effect happens here and is audited.
"""

from __future__ import annotations

import time
from typing import Any

from monitor.act.restart import Restarter
from monitor.judge import accuracy, holds, limiter, pace
from monitor.judge.ladder import Ladder
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict
from monitor.store.state import CheckerState
from monitor.store.store import Store

AT_THE_END = ("restart", "drain", "probe")
STALE_S = 900.0  # older requests are refused, because their operator no longer expects them


def take(store: Store, now: float) -> list[dict[str, Any]]:
    """All waiting requests. One left running by a killed checker is marked failed and not repeated."""
    with store.transaction():
        for interrupted in store.rows("SELECT id FROM requests WHERE state = 'running'"):
            store.end_request(interrupted["id"], now, "failed", "the checker was killed while it carried this out")
        taken = []
        while (request := store.take_request(now)) is not None:
            if abs(now - request["made_at"]) > STALE_S:
                store.end_request(request["id"], now, "refused", f"older than {STALE_S / 60:.0f} minutes")
            else:
                taken.append(request)
    return taken


def carry_out(requests: list[dict[str, Any]], store: Store, state: CheckerState, restarter: Restarter | None, now: float) -> None:
    for request in requests:
        try:
            problem, result = _do(request, state, restarter, now)
        except (ValueError, KeyError, TypeError) as error:
            problem, result = f"invalid request: {error}", ""
        outcome = "refused" if problem else "done"
        with store.transaction():
            state.save(store)
            store.end_request(request["id"], time.time(), outcome, problem or result)
            store.add_action(now, request["target"], request["kind"], request["actor"], outcome, problem or result)


def _do(request: dict[str, Any], state: CheckerState, restarter: Restarter | None, now: float) -> tuple[str, str]:
    """(reason of the refusal, result); one of the two is empty."""
    kind, target = request["kind"], request["target"]
    arguments = request["arguments"] or {}
    if kind == "restart" and restarter is not None:
        _check_target(target, state)
        verdict = Verdict(target, "degraded", "asked", "Requested by an operator.", "操作员要求。", cure=True)
        decision = Decision("restart", f"requested by {request['actor']}")
        return restarter.restart(target, verdict, decision, request["actor"]), "restarted"
    if kind == "drain" and restarter is not None:
        _check_target(target, state)
        return restarter.drain(target, request["actor"]), "stopped; request a restart to start it again"
    if kind == "probe":
        return "", "the questions were asked in this run"
    if kind == "reset":
        for name in tuple(state.limiters) if target in ("", "all") else (target,):
            _check_target(name, state)
            state.limiters[name] = limiter.reset()
        if target != "page":
            state.ladder = Ladder()
            state.accuracy = accuracy.forget_earlier(state.accuracy)
        accepted = "; the pace of today is the new normal" if pace.forget(state.pace) else ""
        return "", f"circuit closed: {arguments.get('reason', 'no reason given')}{accepted}"
    holds.apply(state.holds, kind, arguments, now)
    return "", holds.why_no_restart(state.holds, now) or "in force"


def _check_target(target: str, state: CheckerState) -> None:
    if target not in state.limiters:
        raise ValueError(f"`target` must be one of {', '.join(state.limiters)}. Given: {target}")
