"""What the checker remembers between runs, read once and written once per run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from monitor.judge import history, limiter, thresholds
from monitor.judge.evidence import EngineProgress
from monitor.judge.history import History
from monitor.judge.holds import Holds
from monitor.judge.limiter import Limiter
from monitor.store.store import Store

PARTS = {"api": "api", "page": "web"}  # target -> the name that start.sh knows it by


@dataclass
class Memory:
    """`last` holds small facts of the previous run, `hold` the operators' holds."""

    histories: dict[str, History]
    limiters: dict[str, Limiter]
    thresholds: dict[str, thresholds.ThresholdState]
    last: dict[str, Any]
    hold: Holds
    external_engine: EngineProgress


def remember(store: Store, boot_id: str) -> Memory:
    return Memory(
        {target: history.from_dict(store.get(f"history:{target}", {})) for target in PARTS},
        {target: limiter.from_dict(store.get(f"limiter:{target}", {})) for target in PARTS},
        {name: thresholds.from_dict(raw) for name, raw in store.get("thresholds", {}).items()},
        store.get("last", {}),
        store.get("hold", {}),
        EngineProgress.from_dict(store.get("foreign", {}), boot_id),
    )


def save(store: Store, memory: Memory) -> None:
    """Call inside a transaction."""
    for target in PARTS:
        store.put(f"history:{target}", history.to_dict(memory.histories[target]))
        store.put(f"limiter:{target}", limiter.to_dict(memory.limiters[target]))
        incident = memory.histories[target].incident
        if incident is not None:
            store.put_incident(asdict(incident))
    store.put("thresholds", {name: thresholds.to_dict(state) for name, state in memory.thresholds.items()})
    store.put("last", memory.last)
    store.put("hold", memory.hold)
    store.put("foreign", memory.external_engine.to_dict())
