"""Fault injection for `health_check.py drill`; inactive unless GLM_TEST_FAULTS is on.

`logs/api.fault` names one fault: {"fault": NAME, "seconds": S, "pid": PID}. With a pid only that process is affected,
so that a restart ends the fault. Names:

    hang-step     the next step of the engine never ends
    slow-step     the next step takes S seconds, once
    kill-engine   the next step loses the device
    blind         every step that encodes an image raises
    block-loop    the event loop is blocked for S seconds
    slow-start    loading takes S seconds longer
    crash-start   the process exits as soon as it is started
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
STEPS = frozenset({"encode", "compute"})  # methods of the runner: a slice of an image, a batch of tokens
IMAGE_STEP = "encode"
POLL_S = 0.2


class DeviceLost(RuntimeError):
    """Simulates a CUDA error."""


class FaultInjection:
    """Reads the fault file whenever a fault could apply. Thread-safe: it has no state but the file."""

    def __init__(self, log_dir: Path) -> None:
        self._path = log_dir / FILE_NAME

    def active(self) -> tuple[str, float]:
        """The fault to inject into this process now, and its seconds; ("", 0) for none."""
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            if raw.get("pid") not in (None, os.getpid()):
                return "", 0.0
            return str(raw["fault"]), float(raw.get("seconds", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "", 0.0

    def at_start(self) -> None:
        """Called in the engine thread before the model is loaded."""
        fault, seconds = self.active()
        if fault == "slow-start":
            time.sleep(seconds)

    def wrap(self, model: Model) -> Model:
        """The model with a runner that applies the active fault before each step."""
        return replace(model, runner=_FaultyRunner(model.runner, self))

    def before_step(self, step: str) -> None:
        """Called in the engine thread before each step."""
        fault, seconds = self.active()
        if fault == "hang-step":
            while True:  # as with a kernel that never returns, only the end of the process ends this
                time.sleep(3600)
        if fault == "slow-step":
            self._path.unlink(missing_ok=True)
            time.sleep(seconds)
        if fault == "kill-engine":
            raise DeviceLost("fault injection: the device is lost (GLM_TEST_FAULTS)")
        if fault == "blind" and step == IMAGE_STEP:
            raise ValueError("fault injection: images cannot be encoded (GLM_TEST_FAULTS)")

    async def watch_loop(self) -> None:
        """Blocks the event loop while `block-loop` is active; runs until it is cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            fault, seconds = self.active()
            if fault == "block-loop":
                with contextlib.suppress(OSError):
                    self._path.unlink()
                time.sleep(seconds)


class _FaultyRunner:
    """The runner, with the active fault applied before each of its steps."""

    def __init__(self, runner: Any, faults: FaultInjection) -> None:
        self.__dict__.update(_runner=runner, _faults=faults)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runner, name)
        return self._with_faults(name, value) if name in STEPS else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._runner, name, value)

    def failure(self, error: BaseException) -> Any:
        return "device" if isinstance(error, DeviceLost) else self._runner.failure(error)

    def _with_faults(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._faults.before_step(name)
            return function(*args, **kwargs)

        return call
