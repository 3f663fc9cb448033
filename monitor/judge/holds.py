"""Operators' holds: pause and maintenance suspend restarts, silence and maintenance suspend alerts.

A hold is {"from", "until", "reason"} by kind. Times are wall-clock seconds; `until` None means without end.
"""

from __future__ import annotations

from typing import Any

Holds = dict[str, dict[str, Any]]


def apply(holds: Holds, kind: str, arguments: dict[str, Any], now: float) -> None:
    """Changes `holds` in place. Raises ValueError if a required `until` is missing or is not a number."""
    until = None if arguments.get("until") is None else float(arguments["until"])
    if kind == "resume":
        holds.clear()
    elif kind == "pause":
        holds["pause"] = {"from": now, "until": until, "reason": str(arguments.get("reason", ""))}
    elif kind in ("silence", "maintenance"):
        if until is None:
            raise ValueError(f"`until` is required for {kind}")
        holds[kind] = {"from": float(arguments.get("from", now)), "until": until, "reason": str(arguments.get("reason", ""))}


def why_no_restart(holds: Holds, now: float) -> str:
    """Empty if restarts are allowed."""
    for kind, text in (("pause", "paused by an operator"), ("maintenance", "maintenance")):
        if in_force(holds, kind, now):
            reason = holds[kind].get("reason")
            return f"{text}: {reason}" if reason else text
    return ""


def in_force(holds: Holds, kind: str, now: float) -> bool:
    hold = holds.get(kind)
    if not hold:
        return False
    return bool(hold["from"] <= now and (hold["until"] is None or now < hold["until"]))
