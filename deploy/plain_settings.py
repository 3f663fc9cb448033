"""The few settings that stop.sh needs, read even when `.env` or the environment of Python is broken.

Standard library only and no syntax newer than Python 3.8.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

LIMIT_BYTES = 2**20


@dataclass(frozen=True)
class StopSettings:
    """`certain`: there is a settings file and settings.py accepted it; otherwise what could be read, and defaults."""

    log_dir: Path
    stop_s: float
    ports: dict[str, int]
    certain: bool
    replicas: int = 1


def read(root: Path) -> StopSettings:
    """Never fails."""
    try:
        from settings import load

        settings = load()
        ports = {"api": settings.api_port, "web": settings.web_port}
        if settings.engine_command:
            ports["engine"] = settings.engine_port
        return StopSettings(settings.log_dir, settings.stop_s, ports, env_file(root).is_file(), settings.replica_count)
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever is wrong with it, what runs must be stopped
        return unchecked(root)


def unchecked(root: Path) -> StopSettings:
    """Takes each value by itself: one that is no number, or cannot be read, is its default."""
    given = {**_lines_of(env_file(root)), **{name: value for name, value in os.environ.items() if value}}
    ports = {"api": int(_number(given.get("GLM_API_PORT"), 8080)), "web": int(_number(given.get("GLM_WEB_PORT"), 8081))}
    if given.get("GLM_ENGINE_COMMAND"):
        found = re.search(r"//[^/]*:(\d+)", given.get("GLM_ENGINE_URL") or "")
        ports["engine"] = int(_number(found[1] if found else None, 80))
    log_dir = root / (given.get("GLM_LOG_DIR") or "logs")
    stop_s = _number(given.get("GLM_DRAIN_DELAY_S"), 0.0) + _number(given.get("GLM_DRAIN_S"), 10.0)
    replicas = len(given["GLM_GPUS"].split(",")) if given.get("GLM_GPUS") else int(_number(given.get("GLM_REPLICAS"), 1))
    return StopSettings(log_dir, stop_s, ports, False, replicas)


def env_file(root: Path) -> Path:
    return root / (os.environ.get("GLM_ENV_FILE") or ".env")


def _lines_of(path: Path) -> dict[str, str]:
    try:
        if not path.is_file():  # a pipe would block
            return {}
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES)
    except OSError:
        return {}
    text = data.replace(b"\0", b"").decode("utf-8", "replace")  # ASCII in UTF-16 becomes plain
    found = re.findall(r"^[^\w#\n]*(?:export[ \t]+)?(GLM_\w+)[ \t]*=[ \t]*(.*?)[ \t\r]*$", text, re.MULTILINE)
    return {name: re.sub(r"\s+#.*", "", value).strip("'\" \t") for name, value in found}


def _number(text: str | None, default: float) -> float:
    try:
        value = float(text or default)
    except ValueError:
        return default
    return value if 0 <= value <= 65535 else default
