"""All that is remembered between runs, read once and written once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from monitor.judge import history, limiter, thresholds
from monitor.judge.history import History
from monitor.judge.limiter import Limiter
from monitor.observe import external_engine as foreign
from monitor.store.store import Store

PARTS = {"api": "api", "page": "web"}  # target -> what start.sh calls it


@dataclass
class Memory:
    """`last` holds small facts of the run before, `hold` what operators asked for (monitor/store/operator_requests.py)."""

    histories: dict[str, History]
    limiters: dict[str, Limiter]
    warned: dict[str, thresholds.Warned]
    last: dict[str, Any]
    hold: dict[str, Any]
    foreign: foreign.Memory


def remember(store: Store, boot_id: str) -> Memory:
    return Memory(
        {target: history.from_dict(store.get(f"history:{target}", {})) for target in PARTS},
        {target: limiter.from_dict(store.get(f"limiter:{target}", {})) for target in PARTS},
        {name: thresholds.from_dict(raw) for name, raw in store.get("thresholds", {}).items()},
        store.get("last", {}),
        store.get("hold", {}),
        foreign.from_dict(store.get("foreign", {}), boot_id),
    )


def save(store: Store, memory: Memory) -> None:
    """Call inside a transaction."""
    for target in PARTS:
        store.put(f"history:{target}", history.to_dict(memory.histories[target]))
        store.put(f"limiter:{target}", limiter.to_dict(memory.limiters[target]))
        incident = memory.histories[target].incident
        if incident is not None:
            store.put_incident(asdict(incident))
    store.put("thresholds", {name: thresholds.to_dict(warned) for name, warned in memory.warned.items()})
    store.put("last", memory.last)
    store.put("hold", memory.hold)
    store.put("foreign", foreign.to_dict(memory.foreign))
