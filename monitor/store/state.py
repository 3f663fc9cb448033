"""The checker's state between runs: loaded once and saved once per run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from monitor.judge import accuracy, history, ladder, limiter, thresholds
from monitor.judge.accuracy import Accuracy
from monitor.judge.evidence import EngineProgress
from monitor.judge.history import History
from monitor.judge.holds import Holds
from monitor.judge.ladder import Ladder
from monitor.judge.limiter import Limiter
from monitor.judge.pace import Pace
from monitor.judge.traffic import TrafficLog
from monitor.store.store import Store

PARTS = {"api": "api", "page": "web"}  # target -> its name on start.sh's command line
WITH_FRONT = {**PARTS, "front": "front"}  # where there are several replicas: the nginx before them

Part = TypeVar("Part")


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
    accuracy: Accuracy
    traffic: TrafficLog = field(default_factory=TrafficLog)

    @classmethod
    def load(cls, store: Store, boot_id: str, targets: Iterable[str] = PARTS) -> CheckerState:
        """What cannot be understood is taken from the second copy, else begins anew."""
        targets = tuple(targets)
        return cls(
            {target: _read(store, f"history:{target}", history.from_dict) for target in targets},
            {target: _read(store, f"limiter:{target}", limiter.from_dict) for target in targets},
            _read(store, "thresholds", lambda raw: {name: thresholds.from_dict(each) for name, each in raw.items()}),
            _read(store, "last", _numbers),
            _read(store, "hold", _holds),
            _read(store, "foreign", lambda raw: EngineProgress.from_dict(raw, boot_id)),
            _read(store, "ladder", ladder.from_dict),
            _read(store, "pace", Pace.from_dict),
            _read(store, "accuracy", accuracy.from_dict),
            _read(store, "traffic", TrafficLog.from_dict),
        )

    def save(self, store: Store) -> None:
        """Call inside a transaction."""
        for target in self.histories:
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
        store.put("ladder", ladder.to_dict(self.ladder))
        store.put("pace", self.pace.to_dict())
        store.put("traffic", self.traffic.to_dict())


def _read(store: Store, name: str, parse: Callable[[Any], Part]) -> Part:
    for source, raw in (("store", store.get(name)), ("copy", store.get_copy(name))):
        # None: never written, or not JSON. An empty value of the store was written, and the copy may be older.
        if raw is None or (source == "copy" and not raw):
            continue
        try:
            found = parse(raw)
            _check_types(found)
            if source == "copy":
                store.note_unreadable(name)
            return found
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            store.note_unreadable(name)
    return parse({})


def _check_types(value: object) -> None:
    """Raises TypeError for a field of another type than it is declared with: dataclasses do not check."""
    if isinstance(value, dict):
        for each in value.values():
            _check_types(each)
    if not is_dataclass(value):
        return
    types: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    for each in fields(value):
        found, declared = getattr(value, each.name), str(each.type).split(" | ")
        expected = types.get(declared[0])
        if expected and not isinstance(found, expected) and not (found is None and "None" in declared):
            raise TypeError(f"{each.name} is {type(found).__name__}, not {each.type}")
        _check_types(found)


def _numbers(raw: dict[str, Any]) -> dict[str, Any]:
    """The facts of the previous run: numbers, true or false, or text, but for what is nested."""
    if not isinstance(raw.get("runs", 0), int) or not isinstance(raw.get("asked_at", 0), int | float):
        raise TypeError("the number of runs")
    return dict(raw)


def _holds(raw: dict[str, Any]) -> Holds:
    for hold in raw.values():
        if not isinstance(hold["from"], int | float) or not isinstance(hold["until"], int | float | None):
            raise TypeError("the time of a hold")
    return dict(raw)
