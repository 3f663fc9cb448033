"""The checker's state between runs: loaded once and saved once per run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from monitor.judge import history, ladder, limiter, thresholds
from monitor.judge.evidence import EngineProgress
from monitor.judge.history import History
from monitor.judge.holds import Holds
from monitor.judge.ladder import Ladder
from monitor.judge.limiter import Limiter
from monitor.judge.pace import Pace
from monitor.judge.traffic import TrafficLog
from monitor.store.store import Store

PARTS = {"api": "api", "page": "web"}  # target -> its name on start.sh's command line


@dataclass
class CheckerState:
    """`last` holds a few facts of the previous run, `holds` the operators' holds, `ladder` the rungs taken for a corrupt API."""

    histories: dict[str, History]
    limiters: dict[str, Limiter]
    thresholds: dict[str, thresholds.ThresholdState]
    last: dict[str, Any]
    holds: Holds
    external_engine: EngineProgress
    ladder: Ladder
    pace: Pace
    traffic: TrafficLog = field(default_factory=TrafficLog)

    @classmethod
    def load(cls, store: Store, boot_id: str) -> CheckerState:
        return cls(
            {target: history.from_dict(store.get(f"history:{target}", {})) for target in PARTS},
            {target: limiter.from_dict(store.get(f"limiter:{target}", {})) for target in PARTS},
            {name: thresholds.from_dict(raw) for name, raw in store.get("thresholds", {}).items()},
            store.get("last", {}),
            store.get("hold", {}),
            EngineProgress.from_dict(store.get("foreign", {}), boot_id),
            ladder.from_dict(store.get("ladder", {})),
            Pace.from_dict(store.get("pace", {})),
            TrafficLog.from_dict(store.get("traffic", {})),
        )

    def save(self, store: Store) -> None:
        """Call inside a transaction."""
        for target in PARTS:
            store.put(f"history:{target}", history.to_dict(self.histories[target]))
            store.put(f"limiter:{target}", limiter.to_dict(self.limiters[target]))
            incident = self.histories[target].incident
            if incident is not None:
                store.put_incident(asdict(incident))
        store.put("thresholds", {name: thresholds.to_dict(state) for name, state in self.thresholds.items()})
        store.put("last", self.last)
        store.put("hold", self.holds)
        store.put("foreign", self.external_engine.to_dict())
        store.put("ladder", ladder.to_dict(self.ladder))
        store.put("pace", self.pace.to_dict())
        store.put("traffic", self.traffic.to_dict())
