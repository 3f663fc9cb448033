"""Faults on order, for `health_check.py drill`. Nothing of this exists unless GLM_TEST_FAULTS is on.

`logs/api.fault` holds one order: {"fault": NAME, "seconds": S, "pid": PID}. With a pid only that process obeys, so
the one that is started in its place is sound again. Names:

    hang-step     the next step of the engine never ends
    slow-step     the next step takes S seconds, once
    kill-engine   the next step loses the device
    blind         every step that looks at a picture raises
    block-loop    the event loop stands still for S seconds
    slow-start    loading takes S seconds longer
    crash-start   the process ends as soon as it is started
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from api.engine.loaded_model import Model

FILE_NAME = "api.fault"
STEPS = frozenset({"encode", "compute"})  # of the runner: a slice of the vision tower, a batch of tokens
PICTURE_STEP = "encode"
POLL_S = 0.2


class DeviceLost(RuntimeError):
    """Stands for a CUDA error."""


class Faults:
    def __init__(self, log_dir: Path) -> None:
        self._path = log_dir / FILE_NAME

    def order(self) -> tuple[str, float]:
        """The fault that this process is told to have now; ("", 0) for none."""
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            if raw.get("pid") not in (None, os.getpid()):
                return "", 0.0
            return str(raw["fault"]), float(raw.get("seconds", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "", 0.0

    def at_start(self) -> None:
        fault, seconds = self.order()
        if fault == "slow-start":
            time.sleep(seconds)

    def wrap(self, model: Model) -> Model:
        return replace(model, runner=_Haunted(model.runner, self))

    def before(self, work: str) -> None:
        """Called in the engine thread before each step."""
        fault, seconds = self.order()
        if fault == "hang-step":
            while True:  # nothing but the end of the process ends this, like a kernel that never returns
                time.sleep(3600)
        if fault == "slow-step":
            self._path.unlink(missing_ok=True)
            time.sleep(seconds)
        if fault == "kill-engine":
            raise DeviceLost("told to lose the device (GLM_TEST_FAULTS)")
        if fault == "blind" and work == PICTURE_STEP:
            raise ValueError("told to be blind (GLM_TEST_FAULTS)")

    async def haunt_loop(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            fault, seconds = self.order()
            if fault == "block-loop":
                with contextlib.suppress(OSError):
                    self._path.unlink()
                time.sleep(seconds)


class _Haunted:
    """The runner, with an order looked for before each of its steps."""

    def __init__(self, runner: Any, faults: Faults) -> None:
        self.__dict__.update(_runner=runner, _faults=faults)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runner, name)
        return self._watched(name, value) if name in STEPS else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._runner, name, value)

    def failure(self, error: BaseException) -> Any:
        return "device" if isinstance(error, DeviceLost) else self._runner.failure(error)

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._faults.before(name)
            return function(*args, **kwargs)

        return call
