"""The checker's state between runs: loaded once and saved once per run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from monitor.judge import accuracy, history, limiter, thresholds
from monitor.judge.accuracy import Accuracy
from monitor.judge.evidence import EngineProgress
from monitor.judge.history import History
from monitor.judge.holds import Holds
from monitor.judge.limiter import Limiter
from monitor.store.store import Store

PARTS = {"api": "api", "page": "web"}  # target -> its name on start.sh's command line


@dataclass
class CheckerState:
    """`last` holds a few facts of the previous run, `holds` the operators' holds."""

    histories: dict[str, History]
    limiters: dict[str, Limiter]
    thresholds: dict[str, thresholds.ThresholdState]
    last: dict[str, Any]
    holds: Holds
    external_engine: EngineProgress
    accuracy: Accuracy

    @classmethod
    def load(cls, store: Store, boot_id: str) -> CheckerState:
        return cls(
            {target: history.from_dict(store.get(f"history:{target}", {})) for target in PARTS},
            {target: limiter.from_dict(store.get(f"limiter:{target}", {})) for target in PARTS},
            {name: thresholds.from_dict(raw) for name, raw in store.get("thresholds", {}).items()},
            store.get("last", {}),
            store.get("hold", {}),
            EngineProgress.from_dict(store.get("foreign", {}), boot_id),
            accuracy.from_dict(store.get("accuracy", {})),
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
        store.put("accuracy", accuracy.to_dict(self.accuracy))
        store.put("foreign", self.external_engine.to_dict())
