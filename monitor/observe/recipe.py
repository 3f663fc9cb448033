"""What the API computes with: the part of GET /info on which its speed depends by choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitor.observe.http_exchange import exchange
from settings import Settings

LIMIT_S = 1.0
# Not the number of threads or the kernels, which are chosen anew at each start: losing some is a cause, not another recipe.
NAMES = ("model", "revision", "class", "parameters", "device", "dtype", "quantization", "recipe")


def read(settings: Settings) -> str:
    """Empty if it could not be read in time."""
    if settings.engine_url:
        return settings.engine_url
    headers = {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else {}
    reply = exchange(f"{settings.api_base_url}/info", LIMIT_S, headers=headers)
    return describe(reply.json() or {}) if reply.status == 200 else ""


def describe(info: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {info[name]}" for name in NAMES if info.get(name) is not None)
