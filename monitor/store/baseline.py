"""The file of the model's baseline, for the API's GET /info, the console and the report; also read back if the store is lost."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monitor.judge import accuracy
from monitor.judge.accuracy import Accuracy
from monitor.observe.small_file import read_small

FILE_NAME = "baseline.json"


def read(log_dir: Path) -> dict[str, Any]:
    """Empty if the file is missing or is no baseline."""
    try:
        raw = json.loads(read_small(log_dir / FILE_NAME))
        accuracy.from_dict(raw)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}
    return dict(raw)


def write(known: Accuracy, log_dir: Path) -> None:
    """Replaces the file if it differs. Raises OSError."""
    if not known.kinds:
        return
    wanted = contents(known)
    if read(log_dir) == wanted:
        return
    path = log_dir / FILE_NAME
    new = path.with_suffix(".json.new")
    new.unlink(missing_ok=True)
    with new.open("x", encoding="utf-8", errors="replace") as file:
        file.write(json.dumps(wanted, indent=1) + "\n")
    os.replace(new, path)


def contents(known: Accuracy) -> dict[str, Any]:
    """`kinds`: of each kind of question how many were asked and rightly answered in the baseline and, `later_`, after it."""
    kept = ("asked", "right", "later_asked", "later_right")
    kinds = {
        kind: {name: value for name, value in asdict(record).items() if name in kept} | {"sure": record.sure}
        for kind, record in known.kinds.items()
    }
    return {"key": known.key, "kinds": kinds, "taken_at": known.taken_at}
