"""The commands `status` and `watch`: the last report as text. They work while the service, store and checker are down.

On a full disk the newest report is in shared memory only.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import sys
import time
from datetime import datetime
from typing import Any

from monitor.observe.small_file import read_small
from monitor.store.store import Store, fallback_path
from monitor.tell import report
from settings import Settings

GOOD, BAD = 0, 1
REPORT_LIMIT_BYTES = 16 * 2**20
MARKS = {"healthy": "ok", "busy": "ok", "starting": "..", "degraded": " !", "unknown": " ?"}


def read(settings: Settings) -> tuple[dict[str, Any] | None, float]:
    """(newest report, its age in seconds); (None, 0.0) if there is none."""
    found = []
    for read_last in (_from_file, _from_memory):
        try:
            known = read_last(settings)
            if known is not None:
                found.append((datetime.fromisoformat(known["timestamp"]).timestamp(), known))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, sqlite3.Error):
            continue
    if not found:
        return None, 0.0
    at, newest = max(found, key=lambda pair: pair[0])
    return newest, time.time() - at


def _from_file(settings: Settings) -> dict[str, Any]:
    return dict(json.loads(read_small(settings.log_dir / report.FILE_NAME, REPORT_LIMIT_BYTES)))


def _from_memory(settings: Settings) -> dict[str, Any] | None:
    if not fallback_path(settings.log_dir).exists():
        return None
    with contextlib.closing(Store.read_only(settings.log_dir)) as store:
        return store.last_report()


def show(settings: Settings, as_json: bool) -> int:
    found, age_s = read(settings)
    if found is None:
        print(f"No report at {settings.log_dir / report.FILE_NAME}. Run health_check.py once, or health_check.py install.", file=sys.stderr)
        return BAD
    stale = age_s > settings.check_silent_s
    if as_json:
        print(report.to_json({**found, "age_s": round(age_s, 1), "stale": stale}))
    else:
        print("\n".join(lines(found, age_s, settings)))
    # A stale report is never a success.
    return GOOD if found["service_healthy"] and not stale else BAD


def lines(found: dict[str, Any], age_s: float, settings: Settings) -> list[str]:
    out = [f"{found['verdict'].upper()}   {found['timestamp']}   {_ago(age_s)} ago, took {found['duration_s']} s"]
    if age_s > settings.check_silent_s:
        out.append(f"STALE: the checker has not run for {_ago(age_s)}, so this may be out of date. Try: health_check.py doctor")
    for name, target in found.get("targets", {}).items():
        seen = f" (seen {target['seen']} of {target['needed']})" if target["seen"] and target["seen"] < target["needed"] else ""
        out.append(f" {MARKS.get(target['word'], 'XX')} {name:5} {target['word']:9}{seen} {target['en']}")
        decision = target.get("decision") or {}
        if decision.get("kind") not in (None, "none"):
            out.append(f"          action: {decision['kind']} ({decision['reason']})")
        if target.get("circuit_open"):
            out.append(f"          circuit open: {target['circuit_open']}; health_check.py reset --reason WHY")
    for replica in found.get("replicas", ()):
        card = f", card {replica['card']}" if replica.get("card") else ""
        out.append(f" {MARKS.get(replica['word'], 'XX')}   replica {replica['number']} (port {replica['port']}{card}) {replica['word']:9} {replica['en']}")
        if replica.get("decision") not in (None, "none"):
            out.append(f"          action: {replica['decision']}")
        if replica.get("circuit_open"):
            out.append(f"          circuit open: {replica['circuit_open']}; health_check.py reset --reason WHY")
    for warning in found.get("warnings", ()):
        now = "" if warning["mean"] is None else f" Now {warning['mean']}."
        out.append(f"  ! {warning['en']}{now}")
    check = found.get("check", {})
    if check.get("hold"):
        out.append(f"    no restarts: {check['hold']}")
    if check.get("store") not in (None, "ok"):
        out.append(f"  ! {check['store']}")
    gpu = found["evidence"]["gpu"]
    reason = f"   (GPU: {gpu['reason']})" if gpu.get("reason") else ""
    out.append(
        f"    GPU {_number(found['gpu_load'], '%')}, {_number(found['gpu_memory_used'], ' MiB')}   "
        f"CPU {_number(found['cpu_percent'], '%')}   memory {_number(found['memory_used_percent'], '%')}{reason}"
    )
    return out


def watch(settings: Settings, every_s: float, times: int) -> int:
    """Runs until Ctrl-C, or `times` times."""
    done = 0
    code = BAD
    try:
        while not times or done < times:
            found, age_s = read(settings)
            width = shutil.get_terminal_size().columns
            text = lines(found, age_s, settings) if found else ["No report yet."]
            if sys.stdout.isatty():
                print("\033[H\033[J", end="")
            print("\n".join(line[:width] if sys.stdout.isatty() else line for line in text), flush=True)
            code = GOOD if found and found["service_healthy"] and age_s <= settings.check_silent_s else BAD
            done += 1
            if not times or done < times:
                time.sleep(every_s)
    except KeyboardInterrupt:
        print()
    return code


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:g}{unit}"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"  # the clock may have been set back
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
