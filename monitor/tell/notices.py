"""What people must know about the checker itself: settings or history that it had to replace. In both languages.

They have the form of warnings and travel with them: in the report, on the console, in alerts. None stops a cure.
"""

from __future__ import annotations

from typing import Any

import settings as settings_module
from monitor.store.store import Store
from settings import SettingsError

STORE_SHOWN_S = 86400.0  # damage is over at once, and shown for a day
SETTINGS, STORE = "settings", "store"


def current(store: Store, now: float, of_a_replica: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(notices in force, those that began or ended in this run). Keeps in the store since when each is in force.

    `of_a_replica`: without what the run of the whole says, for all of them.
    """
    known = store.get("notices", {})
    found = {notice["name"]: notice for notice in (None if of_a_replica else _settings(), _store(store, now)) if notice}
    for name, notice in found.items():
        notice["since"] = known.get(name, {}).get("since", now) if name != STORE else notice["since"]
    began = [{**notice, "began": True} for name, notice in found.items() if known.get(name, {}).get("since") != notice["since"]]
    ended = [{**notice, "began": False} for name, notice in known.items() if name not in found and name != STORE]
    if found != known:
        store.put("notices", found)
    return list(found.values()), began + ended


def settings_state(in_force: list[dict[str, Any]]) -> str:
    """For the report: ok, or what is wrong with the settings."""
    return next((notice["en"] for notice in in_force if notice["name"] == SETTINGS), "ok")


def settings_fallback(problem: str) -> dict[str, Any]:
    file = settings_module.ENV_FILE.name
    lines = "; ".join([line for line in problem.splitlines() if not line.startswith(settings_module.ALL_SETTINGS)][:3])
    return {
        "name": SETTINGS, "since": None, "mean": None, "limit": None,
        "en": f"The settings in {file} are invalid, and the last valid ones are in force: {lines}. The servers keep what they read at their start.",
        "zh": f"{file} 中的设置有误，仍使用上次有效的设置：{lines}。运行中的服务保持启动时读取的设置。",
    }  # fmt: skip


def _settings() -> dict[str, Any] | None:
    try:
        problem = settings_module.load_or_last_good()[1]
    except SettingsError as error:
        problem = str(error)
    return settings_fallback(problem) if problem else None


def _store(store: Store, now: float) -> dict[str, Any] | None:
    damage = store.damage or store.get("damage")
    if not damage or not -STORE_SHOWN_S < now - damage["at"] < STORE_SHOWN_S:
        return None
    return {"name": STORE, "since": damage["at"], "mean": None, "limit": None, "en": damage["en"], "zh": damage["zh"]}
