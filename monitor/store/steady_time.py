"""The time by which old rows are deleted. It never runs ahead: a clock that jumps a year must not delete a year of history.

It follows the wall clock, but moves at most PACE times as fast as the time that passed between two looks. After a boot
nothing says how long the machine was off, so the step is at most AFTER_BOOT_S.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACE = 2.0  # so that it catches up after the machine was off
AFTER_BOOT_S = 3600.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def advance(record: Mapping[str, Any], wall: float, monotonic: float | None = None, boot: str | None = None) -> dict[str, Any]:
    """The record after one more look: {"at": the steady time in wall-clock seconds, "monotonic", "boot"}.

    An empty record begins at `wall`; whoever has older rows begins at the newest of them instead, with {"at": its time}.
    """
    monotonic = time.monotonic() if monotonic is None else monotonic
    boot = _boot_id() if boot is None else boot
    at = record.get("at")
    if not isinstance(at, int | float):
        return {"at": wall, "monotonic": monotonic, "boot": boot}
    before, step_s = record.get("monotonic"), AFTER_BOOT_S
    if isinstance(before, int | float) and record.get("boot") == boot and monotonic >= before:
        step_s = PACE * (monotonic - before)
    # A clock that was set back waits for this time, instead of taking it back.
    return {"at": max(at, min(wall, at + step_s)), "monotonic": monotonic, "boot": boot}


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return ""
