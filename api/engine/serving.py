"""What the routes, the metrics and the heartbeat need of an engine, be it the one of this process or one behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from api.engine.command import Action
from api.engine.loaded_model import AnswerLimits, Capacity, SamplingDefaults
from api.engine.pace import PaceCounters
from api.engine.stats import Stats


class ServedModel(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def context_tokens(self) -> int: ...

    @property
    def capacity(self) -> Capacity | None:
        """None: another process's, which does not tell."""

    @property
    def defaults(self) -> SamplingDefaults: ...

    @property
    def answer(self) -> AnswerLimits: ...

    @property
    def facts(self) -> dict[str, Any]: ...


class ServingEngine(Protocol):
    pace: PaceCounters
    after_delivery: Callable[[], None]

    @property
    def model(self) -> ServedModel | None: ...

    @property
    def steps(self) -> int: ...

    def start(self) -> None:
        """Call in the running event loop."""

    def stop(self, timeout_s: float) -> None: ...

    def drain(self, deadline_s: float) -> bool: ...

    def slots(self) -> int: ...

    def queue_size(self) -> int: ...

    def position(self, request_id: str) -> int | None: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> Stats: ...

    def in_flight(self) -> list[dict[str, Any]]: ...

    def guard_report(self) -> dict[str, Any]: ...

    def command(self, action: Action, timeout_s: float) -> float: ...

    def behind(self) -> Mapping[str, Any] | None:
        """Of an engine behind this process: where it is, and whether it answers. None: the engine is in this process."""
