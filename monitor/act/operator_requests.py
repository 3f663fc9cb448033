"""Carries out what operators ask for by rows in the store: restarts, drains, probes, holds and resets.

The page and the command line only insert a row (`Store.ask`); every effect happens here, and each is audited.
"""

from __future__ import annotations

import time
from typing import Any

from monitor.act.restart import Restarter
from monitor.judge import holds, limiter
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict
from monitor.store.memory import PARTS, Memory, save
from monitor.store.store import Store

AT_THE_END = ("restart", "drain", "probe")
STALE_S = 900.0  # after this long the request is refused: its operator no longer expects it to happen


def take(store: Store, now: float) -> list[dict[str, Any]]:
    """All requests that wait. One left running by a checker that was killed is marked failed, not repeated."""
    with store.transaction():
        for interrupted in store.rows("SELECT id FROM requests WHERE state = 'running'"):
            store.end_request(interrupted["id"], now, "failed", "the checker was ended while it worked on this")
        taken = []
        while (request := store.take_request(now)) is not None:
            if abs(now - request["made_at"]) > STALE_S:
                store.end_request(request["id"], now, "refused", f"older than {STALE_S / 60:.0f} minutes")
            else:
                taken.append(request)
    return taken


def carry_out(requests: list[dict[str, Any]], store: Store, memory: Memory, restarter: Restarter | None, now: float) -> None:
    for request in requests:
        try:
            problem, result = _do(request, memory, restarter, now)
        except (ValueError, KeyError, TypeError) as error:
            problem, result = f"cannot be understood: {error}", ""
        outcome = "refused" if problem else "done"
        with store.transaction():
            save(store, memory)
            store.end_request(request["id"], time.time(), outcome, problem or result)
            store.add_action(now, request["target"], request["kind"], request["actor"], outcome, problem or result)


def _do(request: dict[str, Any], memory: Memory, restarter: Restarter | None, now: float) -> tuple[str, str]:
    """(why it was refused, what was done); one of the two is empty."""
    kind, target = request["kind"], request["target"]
    arguments = request["arguments"] or {}
    if kind == "restart" and restarter is not None:
        _check_target(target)
        verdict = Verdict(target, "degraded", "asked", "An operator asked for it.", "操作员要求。", cure=True)
        decision = Decision("restart", f"asked by {request['actor']}")
        return restarter.restart(target, verdict, decision, request["actor"]), "restarted"
    if kind == "drain" and restarter is not None:
        _check_target(target)
        return restarter.drain(target, request["actor"]), "stopped; ask for a restart to start it again"
    if kind == "probe":
        return "", "asked the real questions in this run"
    if kind == "reset":
        for name in PARTS if target in ("", "all") else (target,):
            _check_target(name)
            memory.limiters[name] = limiter.reset()
        return "", f"circuit closed: {arguments.get('reason', 'no reason given')}"
    holds.apply(memory.hold, kind, arguments, now)
    return "", holds.why_no_restart(memory.hold, now) or "in force"


def _check_target(target: str) -> None:
    if target not in PARTS:
        raise ValueError(f"`target` must be one of {', '.join(PARTS)}. Given: {target}")
