"""The console's access to the checker's store: reads the history, adds operators' requests.

Knows nothing of Streamlit. The checker carries out each request and audits it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monitor.store.salvage import is_damage
from monitor.store.store import FILE_NAME, Store

DAY_S = 86400.0
MONTH_S = 30 * DAY_S
RUNS = 2000
MESSAGES = "SELECT made_at, sent_at, channel, incident FROM outbox WHERE made_at >= ? ORDER BY id DESC LIMIT 500"


class HistoryUnavailable(Exception):
    """The store cannot be read or written, for instance because the checker has never run here."""


@dataclass(frozen=True)
class History:
    """Rows as the docstring of `Store` describes them, newest first except for the roll-ups. `messages`: the alerts."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    minutes: list[dict[str, Any]] = field(default_factory=list)
    hours: list[dict[str, Any]] = field(default_factory=list)
    flips: list[dict[str, Any]] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    actions: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def read(log_dir: Path, now: float) -> History:
    """What can be read, if the store is damaged. Raises HistoryUnavailable.

    Where there are several replicas, with what their own stores have of incidents, under targets such as `api/1`.
    """
    history = _read_one(log_dir, now)
    for number in replicas_of(history.report):
        try:
            one = _read_one(log_dir / "replicas" / str(number), now)
        except HistoryUnavailable:
            continue
        history = replace(
            history,
            flips=_merged(history.flips, one.flips, number, "at"),
            incidents=_merged(history.incidents, one.incidents, number, "opened_at"),
            actions=_merged(history.actions, one.actions, number, "at"),
            messages=[*history.messages, *one.messages],
        )
    return history


def replicas_of(report: Mapping[str, Any]) -> list[int]:
    """The numbers of the replicas in the checker's report; empty where there is one API."""
    listed = report.get("replicas") or ()
    return [each["number"] for each in listed if isinstance(each, dict) and isinstance(each.get("number"), int)]


def _merged(whole: list[dict[str, Any]], rows: list[dict[str, Any]], number: int, time: str) -> list[dict[str, Any]]:
    """Newest first, as both are."""
    named = [{**row, "target": f"api/{number}" if row["target"] == "api" else row["target"]} for row in rows]
    return sorted([*whole, *named], key=lambda row: row[time], reverse=True)


def _read_one(log_dir: Path, now: float) -> History:
    try:
        return _read(Store.read_only(log_dir), now)
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        if not is_damage(error, log_dir / FILE_NAME) and isinstance(error, sqlite3.Error):
            raise HistoryUnavailable(str(error)) from None
    try:
        return _read(Store.salvaged(log_dir), now)
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:
        raise HistoryUnavailable(str(error)) from None


def _read(opened: Store, now: float) -> History:
    with closing(opened) as store:
        return History(
            store.runs(now - DAY_S, RUNS),
            store.rollups("minute", now - DAY_S),
            store.rollups("hour", now - MONTH_S),
            store.flips(now - MONTH_S),
            store.incidents(now - MONTH_S),
            store.actions(now - MONTH_S),
            store.requests(),
            store.rows(MESSAGES, now - MONTH_S),
            store.last_report() or {},
        )


def add_request(log_dir: Path, actor: str, kind: str, target: str, arguments: Mapping[str, Any]) -> int:
    """Add an operator's request and return its number. Raises HistoryUnavailable."""
    try:
        with closing(Store.open(log_dir)) as store:
            if store.lost:
                raise HistoryUnavailable(store.lost)
            with store.transaction():
                return store.add_request(time.time(), actor, kind, target, arguments)
    except sqlite3.Error as error:
        raise HistoryUnavailable(str(error)) from None


def add_audit(log_dir: Path, actor: str, kind: str, outcome: str, detail: str) -> None:
    """Add an entry about the console itself to the audit log. Raises HistoryUnavailable."""
    try:
        with closing(Store.open(log_dir)) as store:
            if store.lost:
                raise HistoryUnavailable(store.lost)
            with store.transaction():
                store.add_action(time.time(), "console", kind, actor, outcome, detail)
    except sqlite3.Error as error:
        raise HistoryUnavailable(str(error)) from None


def evidence_files(log_dir: Path, incident: str) -> list[Path]:
    """The files of evidence that the checker saved for an incident, sorted by path."""
    found: list[Path] = []
    for root in (log_dir / "incidents", *sorted((log_dir / "replicas").glob("*/incidents"))):
        folder = root / incident
        if folder.resolve().parent == root.resolve() and folder.is_dir():
            found += sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return found
