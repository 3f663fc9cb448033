"""Injects one fault after another into the running service, and measures detection and recovery.

Every run of the checker is a real process. A fault passes if it is detected within two runs of being visible, is cured if
a restart can cure it, and causes no restart if none can help. Prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from monitor.check import limits_of
from monitor.drill import table
from monitor.drill.catalogue import CRON_REMOVED, CRON_REMOVED_DESCRIPTION, FAULTS, UNAFFECTED, Fault, Report
from monitor.drill.faults import FaultContext
from monitor.judge import history, limiter
from monitor.observe.http_exchange import exchange
from monitor.store.state import PARTS
from monitor.store.store import Store
from monitor.tell.report import replace_file
from settings import ROOT, Settings

GOOD, BAD, WRONG_USE = 0, 1, 2
DETECTED_WITHIN_RUNS = 2


@dataclass
class Result:
    name: str
    description: str
    detected_s: float | None = None
    detected_runs: int | None = None
    recovered_s: float | None = None
    restarts: int = 0
    verdicts: list[str] = field(default_factory=list)
    runs: int = 0
    proven: bool = True
    problem: str = ""
    note: str = ""
    trace: list[dict[str, Any]] = field(default_factory=list)


class Drill:
    def __init__(self, settings: Settings, period_s: float, long_s: float) -> None:
        self.settings = settings
        self.period_s = period_s
        self.context = FaultContext(settings, long_s)

    def all(self) -> Iterator[tuple[str, Callable[[], Result]]]:
        for fault in FAULTS:
            yield fault.name, partial(self.run, fault)
        yield CRON_REMOVED, self.cron_removed

    def run(self, fault: Fault) -> Result:
        result = Result(fault.name, fault.description)
        self.settle()
        began = time.time()
        started = time.monotonic()
        try:
            with fault.inject(self.context):
                self._follow(fault, result, started, began)
                result.note = fault.note(self.context)
                result.trace = self._trace(fault.target, began)
        except (OSError, RuntimeError, KeyError, subprocess.CalledProcessError) as error:
            result.problem = f"the fault could not be injected: {error}"
        self.context.env.clear()
        if not result.problem:
            result.problem = self._judge(fault, result)
        return result

    def _trace(self, target: str, since: float) -> list[dict[str, Any]]:
        """Every observation from the store. A run that restarts observes twice, and its report has the second one only.

        `acts` is false for the second observation, after which nothing is decided.
        """
        with self._store() as store:
            rows = store.rows("SELECT at, report FROM runs WHERE at >= ? AND report IS NOT NULL ORDER BY id", since)
        found, before = [], since
        for row in rows:
            seen = row["report"]["targets"][target]
            acts = bool(seen["decision"]["reason"]) or seen["decision"]["kind"] != "none"
            found.append({
                "after_s": round(row["at"] - before, 1), "word": seen["word"], "decision": seen["decision"]["kind"], "acts": acts,
                "api": row["report"]["evidence"]["api"],
            })  # fmt: skip
            before = row["at"]
        return found

    def _follow(self, fault: Fault, result: Result, started: float, began: float) -> None:
        """Runs the checker period by period until the fault is detected and cured as required, or the runs are used up."""
        visible_s, lasts_s = fault.visible_s(self.settings), fault.lasts_s(self.context)
        result.proven = False
        visible_runs = 0
        after = 0
        while result.runs < max(fault.runs, lasts_s / self.period_s + 3):
            due = time.monotonic() + self.period_s
            report = self.check()
            age_s = time.monotonic() - started
            result.runs += 1
            visible_runs += age_s >= visible_s
            if idle := fault.why_not_in_force(self.context):
                raise RuntimeError(f"run {result.runs}: {idle}")
            target = report["targets"].get(fault.target, {"word": "unknown", "seen": 0, "needed": 1})
            result.verdicts.append(target["word"])
            result.restarts = self._restarts(began, fault.target)
            with self._store() as store:
                result.proven = result.proven or fault.proof(report, store)
                first = store.rows(
                    "SELECT word, first_seen_at FROM incidents WHERE target = ? AND first_seen_at >= ?", fault.target, began
                )
            if result.detected_s is None and first and first[0]["word"] in fault.verdicts:
                # A run that restarted reports the state afterwards; what it detected is in the incident, with a time of
                # the checker's clock, which the fault may have shifted.
                result.detected_s, result.detected_runs = min(age_s, first[0]["first_seen_at"] - began), visible_runs
                result.verdicts.insert(0, first[0]["word"])
            elif result.detected_s is None and target["word"] in fault.verdicts and (result.proven or fault.restarts):
                result.detected_s, result.detected_runs = age_s, visible_runs
            if fault.cured and result.restarts and target["word"] == "healthy" and result.recovered_s is None:
                result.recovered_s = age_s
            if fault.cured and result.recovered_s is not None:
                return
            if not fault.cured and age_s >= lasts_s and result.restarts >= fault.restarts and result.proven:
                after += 1
                if after > 3:  # a few more runs, in which nothing more may happen
                    return
            time.sleep(max(0.0, due - time.monotonic()))

    def _judge(self, fault: Fault, result: Result) -> str:
        if result.detected_s is None:
            return f"not detected in {result.runs} runs ({', '.join(dict.fromkeys(result.verdicts))})"
        if result.restarts != fault.restarts:
            return f"{result.restarts} restarts instead of {fault.restarts}"
        if fault.cured and result.recovered_s is None:
            return "detected but not cured"
        if not result.proven:
            return "the required evidence never appeared"
        if (result.detected_runs or 0) > DETECTED_WITHIN_RUNS and fault.name != "crash-loop":
            return f"detected only in run {result.detected_runs}"
        if not fault.restarts and fault.verdicts == UNAFFECTED and not set(result.verdicts) <= {"healthy", "busy", "degraded", "unknown"}:
            return f"wrong verdicts: {', '.join(dict.fromkeys(result.verdicts))}"
        return ""

    def cron_removed(self) -> Result:
        """Without runs of the checker the server must report it as silent, and as watching again after a run."""
        result = Result(CRON_REMOVED, CRON_REMOVED_DESCRIPTION)
        self.settle()
        started = time.monotonic()
        limit_s = self.settings.check_silent_s
        while time.monotonic() - started < limit_s + 30:
            state = self._checker_state()
            if state == "silent":
                result.detected_s, result.detected_runs = time.monotonic() - started, 1
                break
            time.sleep(1)
        self.check()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and result.detected_s is not None:
            if self._checker_state() == "watching":
                result.recovered_s = time.monotonic() - started
                break
            time.sleep(0.2)
        if result.recovered_s is None:
            result.problem = "the server did not notice" if result.detected_s is None else "it still reports a silent checker"
        return result

    def _checker_state(self) -> str:
        body = exchange(f"{self.settings.api_base_url}/health", 2.0).json() or {}
        return str((body.get("checker") or {}).get("state"))

    def settle(self) -> None:
        """Restores a healthy service and resets the checker's state, so that no fault affects the next one."""
        self.context.clear_fault()
        subprocess.run(["bash", str(ROOT / "start.sh")], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        deadline = time.monotonic() + self.settings.start_deadline_s
        while True:
            self._reset_state()
            report = self.check("--no-act")
            if all(target["word"] == "healthy" for target in report["targets"].values()):
                self._reset_state()
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service does not become healthy: {report['reasons']}")
            time.sleep(1)

    def _reset_state(self) -> None:
        with self._store() as store, store.transaction():
            for target in PARTS:
                # The time of the last run stays: clock jumps are detected with it.
                moment = history.from_dict(store.get(f"history:{target}", {})).moment
                store.put(f"history:{target}", history.to_dict(history.History(moment=moment)))
                store.put(f"limiter:{target}", limiter.to_dict(limiter.reset()))
            store.put("thresholds", {})
            store.execute("DELETE FROM outbox WHERE sent_at IS NULL")

    def check(self, *words: str) -> Report:
        """One run; waits while another run holds the lock."""
        for _ in range(60):
            done = subprocess.run(
                [sys.executable, str(ROOT / "health_check.py"), "run", *words], cwd=ROOT, env={**os.environ, **self.context.env},
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.stdout.startswith("{"):
                found = json.loads(done.stdout)
                if "api" in found.get("evidence", {}):
                    return dict(found)
                raise RuntimeError(f"the checker cannot run: {found['reasons']}")
            time.sleep(1)
        raise RuntimeError(f"the checker does not run: {done.stderr[-500:]}")

    def _restarts(self, since: float, target: str) -> int:
        """Includes failed restarts."""
        with self._store() as store:
            rows = store.rows(
                "SELECT outcome FROM actions WHERE kind = 'restart' AND target = ? AND at >= ? AND outcome != 'refused'", target, since
            )
        return len(rows)

    def _store(self) -> contextlib.closing[Store]:
        return contextlib.closing(Store.open(self.settings.log_dir))


def main(settings: Settings, args: argparse.Namespace) -> int:
    order = [fault.name for fault in FAULTS] + [CRON_REMOVED]
    if args.list:
        for fault in FAULTS:
            print(f"{fault.name:20} {fault.description}")
        print(f"{CRON_REMOVED:20} {CRON_REMOVED_DESCRIPTION}")
        return GOOD
    unknown = [name for name in args.faults if name not in order]
    if unknown:
        print(f"No such fault: {', '.join(unknown)}. Known: {', '.join(order)}", file=sys.stderr)
        return WRONG_USE
    if not args.yes or not settings.test_faults:
        print(
            "The drill kills and breaks the service in this folder. Never run it in production.\n"
            "Set GLM_TEST_FAULTS=true in .env, run ./stop.sh and ./start.sh, then: health_check.py drill --yes", file=sys.stderr,
        )  # fmt: skip
        return WRONG_USE
    out = Path(args.out) if args.out else None
    try:
        if out is not None:
            table.check(out)
    except (table.MarkersMissing, OSError) as error:
        print(f"--out: {error}", file=sys.stderr)
        return WRONG_USE
    period_s = max(1.0, args.period or settings.check_period_s)
    os.environ["GLM_CHECK_PERIOD_S"] = str(period_s)
    drill = Drill(settings, period_s, 8.0 if args.quick else 600.0)
    results: dict[str, Result] = {}
    rows: dict[str, str] = {}
    for name, run in drill.all():
        if args.faults and name not in args.faults:
            continue
        results[name] = run()
        rows[name] = _row(results[name], period_s)
        _print(results[name])
        _write_trace(drill.settings, results[name])
        if out is not None:  # after each fault, so that a later failure loses no measurement
            table.update(out, rows, order)
    drill.settle()
    print("\n" + "\n".join(table.lines(rows, order)))
    return BAD if any(result.problem for result in results.values()) else GOOD


def _print(result: Result) -> None:
    line = f"FAIL  {result.name}: {result.problem}" if result.problem else f"pass  {result.name}: {result.note or 'as required'}"
    print(f"{line}  (detected {_s(result.detected_s)}, recovered {_s(result.recovered_s)}, restarts {result.restarts}, "
          f"verdicts {_verdicts(result)})", flush=True)  # fmt: skip


def _write_trace(settings: Settings, result: Result) -> None:
    """The evidence of each run, for replay in tests."""
    found = {"limits": asdict(limits_of(settings)), "restarts": result.restarts, "runs": result.trace}
    replace_file(settings.log_dir / "drill" / f"{result.name}.json", json.dumps(found, ensure_ascii=False))


def _row(result: Result, period_s: float) -> str:
    passed = f"pass: {result.note}" if result.note else "pass"
    cells = (
        result.name, result.description, _verdicts(result), _s(result.detected_s), _s(result.recovered_s), str(result.restarts),
        f"FAIL: {result.problem}" if result.problem else passed, f"{date.today().isoformat()}, every {period_s:g} s",
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _verdicts(result: Result) -> str:
    return ", ".join(dict.fromkeys(result.verdicts)) or "-"


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"
