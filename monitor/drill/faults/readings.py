"""Faults of readings and of what the checker is configured with: the card's tool, limits, keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from monitor.drill.context import FaultContext
from monitor.drill.faults.ports import MEMORY_EXCEEDED
from monitor.drill.faults.processes import Inject


def fake_nvidia_smi(script: str) -> Inject:
    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        folder = context.settings.log_dir / "drill-bin"
        folder.mkdir(exist_ok=True)
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        with configured(PATH=f"{folder}:{os.environ.get('PATH', '/usr/bin:/bin')}")(context):
            try:
                yield
            finally:
                tool.unlink()
                folder.rmdir()

    return make


@contextmanager
def full_gpu_load(context: FaultContext) -> Iterator[None]:
    """A fake nvidia-smi reports 100 % load on every card."""
    line = "0, GPU-1, 100, 24576, 24000, 576, 550.1, Stand-in, 1, Disabled, Disabled, 83"
    with fake_nvidia_smi(f"echo '{line}'")(context):
        yield


def configured(**variables: str) -> Inject:
    """The checker runs with these variables."""

    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        context.env |= variables
        try:
            yield
        finally:
            for name in variables:
                context.env.pop(name, None)

    return make


exceed_memory_limit = configured(**MEMORY_EXCEEDED)
