"""What operators ask for by rows in the store, and the holds that follow from it: pause, maintenance, silence."""

from __future__ import annotations

import getpass
import sys
import time
from typing import TYPE_CHECKING, Any

from monitor.judge import limiter
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict
from monitor.store.memory import Memory, save
from monitor.store.store import Store
from settings import Settings

if TYPE_CHECKING:
    from monitor.act.restart import Surgeon

AT_THE_END = ("restart", "drain", "probe")
STALE_S = 900.0  # a wish this old was not meant for now


def take(store: Store, now: float) -> list[dict[str, Any]]:
    """Everything that waits. A request left running by a checker that was killed is failed, not repeated."""
    with store.transaction():
        for left in store.rows("SELECT id FROM requests WHERE state = 'running'"):
            store.end_request(left["id"], now, "failed", "the checker was ended while it worked on this")
        taken = []
        while (request := store.take_request(now)) is not None:
            if abs(now - request["made_at"]) > STALE_S:
                store.end_request(request["id"], now, "refused", f"older than {STALE_S / 60:.0f} minutes")
            else:
                taken.append(request)
    return taken


def carry_out(
    requests: list[dict[str, Any]], store: Store, memory: Memory, surgeon: Surgeon | None, now: float
) -> None:
    for request in requests:
        try:
            problem, said = _do(request, memory, surgeon, now)
        except (ValueError, KeyError, TypeError) as error:
            problem, said = f"cannot be understood: {error}", ""
        with store.transaction():
            save(store, memory)
            store.end_request(request["id"], time.time(), "refused" if problem else "done", problem or said)
            store.add_action(
                now, request["target"], request["kind"], request["actor"], "refused" if problem else "done", problem or said
            )


def _do(
    request: dict[str, Any], memory: Memory, surgeon: Surgeon | None, now: float
) -> tuple[str, str]:
    kind, target = request["kind"], request["target"]
    arguments = request["arguments"] or {}
    if kind == "restart" and surgeon is not None:
        _known(target, ("api", "page"))
        verdict = Verdict(target, "degraded", "asked", "An operator asked for it.", "操作员要求。", cure=True)
        return surgeon.restart(target, verdict, Decision("restart", f"asked by {request['actor']}"), request["actor"]), "restarted"
    if kind == "drain" and surgeon is not None:
        _known(target, ("api", "page"))
        return surgeon.drain(target, request["actor"]), "stopped; ask for a restart to start it again"
    if kind == "probe":
        return "", "asked the real questions in this run"
    if kind == "reset":
        for name in ("api", "page") if target in ("", "all") else (target,):
            _known(name, ("api", "page"))
            memory.limiters[name] = limiter.reset()
        return "", f"circuit closed: {arguments.get('reason', 'no reason given')}"
    hold(memory.hold, kind, arguments, now)
    return "", why_hold(memory.hold, now) or "in force"


def hold(holds: dict[str, Any], kind: str, arguments: dict[str, Any], now: float) -> None:
    """Changes the holds in place. Times are wall-clock seconds; None is without end."""
    until = None if arguments.get("until") is None else float(arguments["until"])
    if kind == "resume":
        holds.clear()
    elif kind == "pause":
        holds["pause"] = {"from": now, "until": until, "reason": str(arguments.get("reason", ""))}
    elif kind in ("silence", "maintenance"):
        if until is None:
            raise ValueError(f"`until` is needed for {kind}")
        holds[kind] = {"from": float(arguments.get("from", now)), "until": until, "reason": str(arguments.get("reason", ""))}


def why_hold(holds: dict[str, Any], now: float) -> str:
    """Empty if a cure is allowed."""
    for kind, words in (("pause", "paused by an operator"), ("maintenance", "maintenance")):
        if in_force(holds, kind, now):
            reason = holds[kind].get("reason")
            return f"{words}: {reason}" if reason else words
    return ""


def in_force(holds: dict[str, Any], kind: str, now: float) -> bool:
    found = holds.get(kind)
    if not found:
        return False
    return bool(found["from"] <= now and (found["until"] is None or now < found["until"]))


def from_terminal(settings: Settings, kind: str, target: str, arguments: dict[str, Any]) -> int:
    """The command line asks in the same way as the page does, so there is one audit log. Returns an exit code."""
    store = Store.open(settings.log_dir)
    if store.lost:
        print(store.lost, file=sys.stderr)
        return 1
    who = f"{getpass.getuser()} at a terminal"
    number = store.ask(time.time(), who, kind, target, arguments)
    store.close()
    print(f"Request {number}: {kind} {target}".rstrip() + ". In force from the next run of the checker on.")
    return 0


def _known(target: str, allowed: tuple[str, ...]) -> None:
    if target not in allowed:
        raise ValueError(f"`target` must be one of {', '.join(allowed)}. Given: {target}")
