"""python -m bench.legal_load: heavy legal load for half an hour, with real questions of the checker, and no restart.

A copy of the project serves 24 users at once: text, pictures of 12 megapixels, answers bound by a schema, and users who go
away. The checker runs at its pace and may not take a user's answer for its own question's. Exit code 1 for any restart, any
verdict but healthy and busy, or any failed request of a user.
"""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.project_copy import ProjectCopy, started_copy
from bench.report import percentile
from monitor.drill.faults.load import LEGAL
from monitor.drill.traffic import Traffic

SETTINGS = {"GLM_PROBE_CREDIT_S": "0"}  # ask always, whatever users were answered
UNHARMED = {"healthy", "busy"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.legal_load", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--period", type=float, default=60.0, metavar="SECONDS", help="between two runs of the checker")
    parser.add_argument("--set", action="append", default=[], metavar="GLM_X=VALUE", help="a setting of the copy")
    given = parser.parse_args(arguments)
    settings = SETTINGS | dict(item.split("=", 1) for item in given.set)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with started_copy(settings, "legal-load") as copy:
        traffic = Traffic(copy.url, copy.key)
        with traffic.running(given.streams, LEGAL):
            reports = _check(copy, time.monotonic() + 60 * given.minutes, given.period)
        restarts = _restarts(copy.log_dir)
    return _print(reports, restarts, traffic, given.minutes)


def _check(copy: ProjectCopy, until: float, period_s: float) -> list[dict[str, Any]]:
    reports = []
    due = time.monotonic()
    while due < until:
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due + period_s, time.monotonic())
        done = subprocess.run(copy.command("run"), cwd=copy.folder, env=copy.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            report = {"verdict": "none", "reasons": [done.stderr[-500:]], "duration_s": None, "evidence": {}}
        if report["verdict"] not in UNHARMED:
            print(f"{time.strftime('%H:%M:%S')} {report['verdict']}: {report['reasons']}", flush=True)
        reports.append(report)
    time.sleep(max(0.0, until - time.monotonic()))
    return reports


def _restarts(log_dir: Path) -> int:
    with closing(sqlite3.connect(log_dir / "state.db")) as database:
        (count,) = database.execute("SELECT COUNT(*) FROM actions WHERE kind = 'restart' AND outcome != 'refused'").fetchone()
    return int(count)


def _print(reports: list[dict[str, Any]], restarts: int, traffic: Traffic, minutes: float) -> int:
    verdicts = Counter(report["verdict"] for report in reports)
    answers = [answer for report in reports for answer in (report["evidence"].get("api") or {}).get("answers") or ()]
    outcomes = Counter(answer["outcome"] for answer in answers)
    asked = sum(outcomes.values()) - outcomes["credited"] - outcomes["skipped"]
    waited = [answer["seconds"] for answer in answers if answer["outcome"] == "right"]
    runs = [report["duration_s"] for report in reports if report["duration_s"] is not None]
    print(f"{minutes:g} minutes, {len(reports)} runs of the checker: {dict(verdicts)}; restarts: {restarts}")
    print(f"real questions: {asked} asked, {outcomes['right']} answered rightly; outcomes {dict(outcomes)}")
    print(f"  their answers took {percentile(waited, 0.5) or 0:.2f} s in the median, {max(waited, default=0):.2f} s at most")
    print(f"  a run took {percentile(runs, 0.5) or 0:.2f} s in the median, {max(runs, default=0):.2f} s at most")
    print(f"users: {traffic.summary()}; median {percentile(traffic.seconds, 0.5) or 0:.2f} s")
    unharmed = set(verdicts) <= UNHARMED and asked > 0 and outcomes["right"] > 0
    return 0 if unharmed and not restarts and not traffic.failed else 1


if __name__ == "__main__":
    sys.exit(main())
