"""Commands to the engine: done by its thread between two steps, waited for by the thread that gives them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

Action = Literal["drop-caches", "reload-weights", "fingerprint"]
ACTIONS: tuple[Action, ...] = get_args(Action)

RELOAD_GRACE_S = 20.0  # for running requests to finish before the weights are loaded again


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


class Commands:
    """Those that wait to be done. `wake` guards them, and tells the engine's thread of each."""

    def __init__(self, wake: threading.Condition) -> None:
        self._wake = wake
        self.waiting: tuple[Command, ...] = ()  # in the order in which they were given; replaced as a whole

    def give(self, action: Action, timeout_s: float) -> float:
        """Wait until `action` is done; returns the seconds that it took. Raises CommandFailed."""
        command = Command(action, time.monotonic() + min(RELOAD_GRACE_S, timeout_s / 2))
        with self._wake:
            self.waiting = (*self.waiting, command)
            self._wake.notify_all()
        if not command.done.wait(timeout_s):
            self.take(command)
            raise CommandFailed(f"{action} was not done within {timeout_s:g} s")
        if command.error is not None:
            raise CommandFailed(command.error)
        return command.seconds

    def take(self, command: Command) -> bool:
        """Whether it still waited. It is the caller's then."""
        with self._wake:
            left = tuple(other for other in self.waiting if other is not command)
            waited, self.waiting = len(left) < len(self.waiting), left
        return waited

    def refuse(self, reason: str) -> None:
        """End the waiting of all."""
        with self._wake:
            commands, self.waiting = self.waiting, ()
        for command in commands:
            command.finish(0.0, reason)
