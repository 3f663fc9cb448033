"""A command to the engine: done by its thread between two steps, waited for by the thread that gives it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal, get_args

Action = Literal["drop-caches", "reload-weights", "fingerprint"]
ACTIONS: tuple[Action, ...] = get_args(Action)


class CommandFailed(Exception):
    """A command could not be carried out; the engine goes on as before."""


@dataclass(eq=False)
class Command:
    action: Action
    deadline: float  # time.monotonic() up to which running requests may finish; then they fail
    done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    seconds: float = 0.0

    def finish(self, seconds: float, error: str | None = None) -> None:
        self.seconds, self.error = seconds, error
        self.done.set()
