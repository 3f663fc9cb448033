"""The last lines of a log file, bounded and filtered."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_BYTES = 512 * 1024
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOGS = ("api.log", "web.log", "health.jsonl")
_EACH = "|".join(LEVELS)
_LEVEL = re.compile(rf"\blevel=({_EACH.lower()})\b|\b({_EACH})\b")  # the API's lines, the page's lines


def tail(path: Path, lines: int, at_least: str = "DEBUG", contains: str = "") -> list[str]:
    """The last lines that match, oldest first. A line without a level has the level of the line above; lines before the
    first level are shown at every level.

    Raises OSError. At most MAX_BYTES of the file are read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_BYTES))
        read = file.read(MAX_BYTES)
    text = read.decode("utf-8", "replace").splitlines()
    if size > MAX_BYTES and text:
        text = text[1:]  # begins in the middle of a line
    minimum = LEVELS.index(at_least)
    found, level = [], len(LEVELS)
    for line in text:
        if match := _LEVEL.search(line[:200]):
            level = LEVELS.index((match[1] or match[2]).upper())
        if level >= minimum and contains.lower() in line.lower():
            found.append(line)
    return found[-lines:]
