"""The last lines of a log file, bounded and filtered."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_BYTES = 512 * 1024
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOGS = ("api.log", "web.log", "health.jsonl")
_ANY_LEVEL = "|".join(LEVELS)
_LEVEL = re.compile(rf"\blevel=({_ANY_LEVEL.lower()})\b|\b({_ANY_LEVEL})\b")  # lines of the API; of the page


def logs_of(replicas: int) -> tuple[str, ...]:
    """The names of the logs of a service of so many replicas, below the log folder."""
    if replicas == 1:
        return LOGS
    return (*(f"replicas/{number}/api.log" for number in range(replicas)), "front.log", *LOGS[1:])


def tail(path: Path, lines: int, at_least: str = "DEBUG", contains: str = "") -> list[str]:
    """The last `lines` lines that match, oldest first. Reads at most MAX_BYTES of the file. Raises OSError.

    A line without a level has that of the line above it; lines before the first level match every level.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_BYTES))
        data = file.read(MAX_BYTES)
    text = data.decode("utf-8", "replace").splitlines()
    if size > MAX_BYTES and text:
        text = text[1:]  # it begins in the middle of a line
    minimum = LEVELS.index(at_least)
    matching, level = [], len(LEVELS)
    for line in text:
        if match := _LEVEL.search(line[:200]):
            level = LEVELS.index((match[1] or match[2]).upper())
        if level >= minimum and contains.lower() in line.lower():
            matching.append(line)
    return matching[-lines:]
