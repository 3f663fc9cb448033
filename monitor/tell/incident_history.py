"""The commands `history` and `report`: flips, incidents, actions and availability from the store, as text or JSON."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from monitor.judge.verdict import SERVING
from monitor.store.store import FILE_NAME, Store
from monitor.tell.report import to_json
from settings import Settings

GOOD, BAD = 0, 1


def show(settings: Settings, hours: float, as_json: bool) -> int:
    store = _open(settings)
    if store is None:
        return BAD
    now = time.time()
    since = now - 3600 * hours
    found: dict[str, Any] = {
        "hours": hours,
        "availability": availability(store, since, now, settings.check_period_s),
        "incidents": store.incidents(since),
        "flips": store.flips(since),
        "actions": store.actions(since),
        "requests": store.requests(),
    }
    store.close()
    for number, one in _replicas(settings):
        name = f"api/{number}"
        found["availability"][name] = availability(one, since, now, settings.check_period_s).get("api", {"text": "no data"})
        for kind, rows in (("incidents", one.incidents(since)), ("flips", one.flips(since)), ("actions", one.actions(since))):
            merged = [*found[kind], *({**row, "target": name if row["target"] == "api" else row["target"]} for row in rows)]
            found[kind] = sorted(merged, key=lambda row: row.get("at") or row.get("opened_at") or 0.0, reverse=True)
        one.close()
    if as_json:
        print(to_json(found))
        return GOOD
    for target, share in found["availability"].items():
        print(f"{target}: {share['text']}")
    for title, rows, line in (
        ("Incidents", found["incidents"], _incident_line),
        ("Flips", found["flips"], lambda r: f"{_when(r['at'])}  {r['target']:5} {r['before']} -> {r['after']}  {r['en']}"),
        ("Actions", found["actions"], lambda r: f"{_when(r['at'])}  {r['target']:5} {r['kind']} by {r['actor']}: {r['outcome']}. {r['detail']}"),
    ):  # fmt: skip
        print(f"\n{title} of the last {hours:g} h: {len(rows) or 'none'}")
        for row in rows[:50]:
            print("  " + line(row))
    return GOOD


def availability(store: Store, since: float, now: float, period_s: float) -> dict[str, dict[str, Any]]:
    """Share of runs in which each target served users. Time without a run is reported separately, never as available."""
    span = "minute" if now - since <= 86400 else "hour"
    counts: dict[str, dict[str, int]] = {}
    seen_s = 0.0
    for row in store.rollups(span, since):
        seen_s += (row["sums"].get("seen_s") or [row["runs"] * period_s])[0]
        for target, words in row["words"].items():
            kept = counts.setdefault(target, {})
            for word, number in words.items():
                kept[word] = kept.get(word, 0) + number
    first = store.execute("SELECT MIN(start) FROM rollups WHERE span = ? AND start >= ?", span, since).fetchone()[0]
    first_run = store.execute("SELECT MIN(at) FROM runs WHERE at >= ?", since).fetchone()[0]
    # A roll-up begins with its minute or hour, the first run perhaps later.
    begin = max((at for at in (first, first_run if first_run and first and first_run - first < 3600 else None) if at), default=now)
    seen_s = min(seen_s, max(0.0, now - begin))
    found: dict[str, dict[str, Any]] = {}
    for target, words in counts.items():
        judged = sum(number for word, number in words.items() if word != "unknown")
        served = sum(words.get(word, 0) for word in SERVING)
        share = served / judged if judged else None
        looked = min(1.0, seen_s / max(1.0, now - since))
        busy = words.get("busy", 0)
        text = f"{rounded_down(share)} % served of the {lasted(seen_s)} seen" if share is not None else "no data"
        text += f" ({judged} runs, {busy} busy); seen: {rounded_down(looked)} % of the last {lasted(now - since)}"
        found[target] = {
            "share": share, "looks": judged, "busy": busy, "words": words, "seen_s": round(seen_s, 1), "looked_share": looked, "text": text,
        }  # fmt: skip
    return found


def rounded_down(share: float) -> str:
    """In percent, so that 99.996 % is not shown as 100 %, and nine seconds of a day not as 0 %."""
    percent = int(share * 10_000 + 1e-9) / 100
    return f"{percent:g}" if percent or not share else "under 0.01"


def lasted(seconds: float) -> str:
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit - 1e-6:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} s"


def show_incident(settings: Settings, name: str | None) -> int:
    """Prints one incident from its first symptom to its end."""
    store = _open(settings)
    if store is None:
        return BAD
    rows = store.rows("SELECT * FROM incidents WHERE id = ?", name) if name else store.incidents(limit=1)
    whole = settings
    for number, one in _replicas(whole):
        theirs = one.rows("SELECT * FROM incidents WHERE id = ?", name) if name else one.incidents(limit=1)
        if theirs and (not rows or theirs[0]["opened_at"] > rows[0]["opened_at"]):
            store.close()
            store, rows, settings = one, theirs, whole.for_replica(number)
        else:
            one.close()
    if not rows:
        print(f"No such incident: {name!r}." if name else "No incident so far.", file=sys.stderr)
        store.close()
        return BAD
    print("\n".join(incident_text(store, rows[0], settings)))
    store.close()
    return GOOD


def incident_text(store: Store, row: Mapping[str, Any], settings: Settings) -> list[str]:
    end = row["recovered_at"]
    out = [
        f"Incident {row['id']}", "", row["en"], row["zh"], "",
        f"  target           {row['target']}", f"  verdict          {row['word']} (rule {row['rule']})",
        f"  first seen       {_when(row['first_seen_at'])}", f"  confirmed        {_when(row['opened_at'])}",
        f"  recovered        {_when(end) if end else 'not yet'}" + (f"  ({end - row['first_seen_at']:.0f} s after the first symptom)" if end else ""),
        f"  closed (stable)  {_when(row['closed_at']) if row['closed_at'] else 'not yet'}",
        f"  restarts         {row['restarts']}", f"  symptoms         {', '.join(row['symptoms'] or [])}", "", "Timeline",
    ]  # fmt: skip
    until = (row["closed_at"] or time.time()) + 1
    events = [(f["at"], f"{f['before']} -> {f['after']}: {f['en']}") for f in store.flips(row["first_seen_at"] - 1) if f["target"] == row["target"] and f["at"] <= until]
    events += [
        (a["at"], f"{a['kind']} by {a['actor']}: {a['outcome']} in {a['duration_s']:.1f} s. {a['detail']}")
        for a in store.actions(row["first_seen_at"] - 1) if a["incident"] == row["id"]
    ]  # fmt: skip
    out += [f"  {_when(at)}  {what}" for at, what in sorted(events)]
    folder = settings.log_dir / "incidents" / row["id"]
    if folder.is_dir():
        out += ["", f"Evidence: {folder}"]
    return out


def _incident_line(row: Mapping[str, Any]) -> str:
    state = "open" if row["closed_at"] is None and row["recovered_at"] is None else "recovered" if row["closed_at"] is None else "closed"
    return f"{_when(row['opened_at'])}  {row['target']:5} {row['word']:9} {state:9} restarts {row['restarts']}  {row['id']}"


def _replicas(settings: Settings) -> Iterator[tuple[int, Store]]:
    """The stores of several replicas; of those that have one."""
    for number in range(settings.replica_count) if settings.replica_count > 1 else ():
        one = settings.for_replica(number)
        if (one.log_dir / FILE_NAME).exists() and (store := _open(one)) is not None:
            yield number, store


def _open(settings: Settings) -> Store | None:
    path = settings.log_dir / FILE_NAME
    if not os.path.lexists(path):
        print(f"No history yet: {path} does not exist. Run health_check.py once.", file=sys.stderr)
        return None
    try:
        store = Store.read_only(settings.log_dir)
        store.check_pages()
        return store
    except (sqlite3.Error, OSError) as error:
        salvaged = Store.salvaged(settings.log_dir)
        print(f"{salvaged.lost} ({error}). This is what can be read of it:", file=sys.stderr)
        return salvaged


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="seconds")
