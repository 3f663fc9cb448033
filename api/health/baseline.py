"""The checker's baseline of this model: how often it has answered each kind of question rightly when it was new."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

FILE_NAME = "baseline.json"
MAX_BYTES = 64 * 1024


def read_baseline(log_dir: Path) -> dict[str, Any] | None:
    """The file as the checker wrote it; None if it is missing, larger than MAX_BYTES, or no JSON object. Reads a disk."""
    path = log_dir / FILE_NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            return None
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        found = json.loads(text) if len(text) <= MAX_BYTES else None
        # What cannot be sent again, such as NaN or half of a surrogate pair, must not make an error of the answer.
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
