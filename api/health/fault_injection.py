"""Fault injection for `health_check.py drill`; inactive unless GLM_TEST_FAULTS is on.

`logs/api.fault` names one fault: {"fault": NAME, "seconds": S, "pid": PID}. With a pid only that process is affected,
so that a restart ends the fault. Names:

    hang-step     the next step of the engine never ends
    slow-step     the next step takes S seconds, once
    kill-engine   the next step loses the device
    blind         every step that encodes an image raises
    block-loop    the event loop is blocked for S seconds
    slow-start    loading takes S seconds longer, and moves meanwhile
    slow-loading-still  loading stands still for S seconds: nothing of it moves
    nan-layer     one row of one layer is not a number: {"layer": the middle one, "row": 0, "steps": 1}
    flip-weight   one high bit of a weight flips, once: {"weight": part of its name, "bit": 30} or a random one
    swap-colors   red and green are swapped in the weights of the vision encoder, once
    crash-start   the process exits as soon as it is started

What `flip-weight` and `swap-colors` change stays until the weights are loaded again or the process is restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from api.engine.engine import Progress
from api.engine.loaded_model import Model
from api.engine.loading.progress import unseen

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
        options = self._options()
        return (str(options["fault"]), float(options.get("seconds", 0))) if options else ("", 0.0)

    def _options(self) -> dict[str, Any]:
        """The fault file, if it names a fault for this process; else empty."""
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            float(raw.get("seconds", 0))
            return raw if raw.get("pid") in (None, os.getpid()) and raw.get("fault") else {}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def at_start(self, progress: Progress = unseen) -> None:
        """Called in the engine thread before the model is loaded."""
        fault, seconds = self.active()
        if fault == "slow-start":
            for step in range(int(seconds / POLL_S)):
                progress(0.02 * step / (step + 1))
                time.sleep(POLL_S)
        if fault == "slow-loading-still":
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

    def change_model(self, runner: Any) -> None:
        """Called in the engine thread before each step: apply the faults that change what the model computes."""
        options = self._options()
        fault = options.get("fault")
        if fault == "nan-layer":
            steps = int(options.get("steps", 1))
            layer = int(options.get("layer", runner.decoder.layers // 2))
            runner.observer = _not_a_number(layer, int(options.get("row", 0))) if steps > 0 else None
            self._rewrite({**options, "steps": steps - 1} if steps > 0 else None)
        elif fault == "flip-weight":
            flip_bit(runner, str(options.get("weight", "")), options.get("index"), options.get("bit"))
            self._rewrite(None)
        elif fault == "swap-colors":
            swap_colors(runner)
            self._rewrite(None)
        elif getattr(runner, "observer", None) is not None:
            runner.observer = None

    def _rewrite(self, options: dict[str, Any] | None) -> None:
        if options is None:
            self._path.unlink(missing_ok=True)
        else:
            self._path.write_text(json.dumps(options), encoding="utf-8")

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
            self._faults.change_model(self._runner)
            return function(*args, **kwargs)

        return call


def _not_a_number(layer: int, row: int) -> Callable[[int, Any, Any], None]:
    def observe(number: int, x: Any, normed: Any) -> None:
        if number == layer and row < len(x):
            x[row] = normed[row] = float("nan")

    return observe


def flip_bit(runner: Any, name: str = "", index: int | None = None, bit: int | None = None) -> tuple[str, int, int]:
    """Flip one bit of one weight; returns the name of the tensor, the byte in its memory and the bit in that byte.

    `name` is a part of the tensor's name, by default any, weighted by size; `index` the number of the element; `bit` the
    bit of an element, from the lowest, by default the second highest: the highest of the exponent.
    """
    import torch

    from api.engine.model.weights import raw_bytes, weights_of

    with torch.inference_mode():
        found = [(n, t, raw_bytes(t)) for n, t in weights_of(runner) if name in n and t.is_floating_point()]
        if not found:
            raise ValueError(f"fault injection: no weight is called {name!r}")
        name, tensor, memory = random.choices(found, [len(memory) for _, _, memory in found])[0]
        size = tensor.dtype.itemsize
        element = random.randrange(len(memory) // size) if index is None else int(index)
        bit = 8 * size - 2 if bit is None else int(bit)
        byte = element * size + bit // 8
        memory[byte] ^= 1 << bit % 8
        return name, byte, bit % 8


def swap_colors(runner: Any) -> None:
    """Swap red and green in the weights that the pixels are multiplied with."""
    import torch

    encoder = runner.vision_encoder
    embed = encoder._embed
    bias_name = "bias" if hasattr(embed, "bias") else "_bias"
    bias = getattr(embed, bias_name)
    with torch.inference_mode():
        setattr(embed, bias_name, None)  # the product with the unit matrix is the matrix itself, in any layout
        weight = embed(torch.eye(embed.in_features, dtype=encoder.dtype, device=encoder.device)).T
        red, green, blue = weight.unflatten(1, (3, -1)).unbind(1)
        encoder._embed = runner.operations.linear(torch.stack([green, red, blue], 1).flatten(1), bias)
