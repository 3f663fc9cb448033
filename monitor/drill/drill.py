"""Injects one fault after another into the running service, and measures detection and recovery.

Every run of the checker is a real process, started by the drill or by cron. A fault passes if it is detected within two runs
of being visible, is cured if a restart can cure it, and causes no restart if none can help. Prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from monitor import schedule
from monitor.check import limits_of
from monitor.drill import table
from monitor.drill.catalogue import (
    BEFORE_S,
    CRON_REMOVED,
    CRON_REMOVED_DESCRIPTION,
    FAULTS,
    NOT_HERE,
    RUNS_AFTER,
    UNAFFECTED,
    Fault,
    Report,
)
from monitor.drill.checker import CheckerSilent, CronRuns, OwnRuns, Runs, check, memory_watched
from monitor.drill.context import FaultContext
from monitor.judge import history, ladder, limiter
from monitor.observe.http_exchange import exchange
from monitor.store.state import PARTS
from monitor.store.store import Store
from monitor.tell.report import replace_file
from settings import ROOT, Settings

GOOD, BAD, WRONG_USE = 0, 1, 2
QUICK_S, LONG_S = 8.0, 600.0  # of the long faults
HEALTHY_WITHIN_S = 300.0
STILL_BAD_S = 20.0  # then everything is stopped and started
MOST_RUNS_BEFORE = 150


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
    def __init__(self, settings: Settings, context: FaultContext, runs: Runs) -> None:
        self.settings = settings
        self.context = context
        self.runs = runs

    def all(self) -> Iterator[tuple[str, Callable[[], Result]]]:
        for fault in FAULTS:
            yield fault.name, partial(self.run, fault)
        yield CRON_REMOVED, self.cron_removed

    def run(self, fault: Fault) -> Result:
        result = Result(fault.name, fault.description)
        if why := fault.why_not_here(self.context):
            result.problem = f"not made here: {why}"
            return result
        try:
            self.settle()
            with fault.around(self.context), memory_watched(self.context):
                self._wait_until_ready(fault)
                began = self.context.injected_at = time.time()
                started = time.monotonic()
                with fault.inject(self.context):
                    self.runs.begin()
                    self._follow(fault, result, started, began)
                    self.runs.end()
                    result.note = fault.note(self.context)
                    result.trace = self._trace(fault.target, began)
        except CheckerSilent as error:
            result.problem = str(error)
        except (OSError, RuntimeError, KeyError, sqlite3.Error, subprocess.CalledProcessError) as error:
            result.problem = f"the fault could not be injected: {error}"
        finally:
            self.runs.end()
            self.context.env.clear()
        if not result.problem:
            result.problem = self._judge(fault, result)
        return result

    def _wait_until_ready(self, fault: Fault) -> None:
        """Runs of the checker before the fault, for what it compares with."""
        runs = 0
        while runs < fault.runs_before or (fault.why_not_ready(self.context) and runs < MOST_RUNS_BEFORE):
            check(self.context)
            time.sleep(BEFORE_S)
            runs += 1
        if why := fault.why_not_ready(self.context):
            raise RuntimeError(why)
        if runs:
            self._reset_state()

    def _trace(self, target: str, since: float) -> list[dict[str, Any]]:
        """Every observation from the store. A run that restarts observes twice, and its report has the second one only.

        `acts` is false for the second observation, after which nothing is decided.
        """
        rows = self._rows("SELECT at, report FROM runs WHERE at >= ? AND report IS NOT NULL ORDER BY id", since)
        found, before = [], since
        for row in rows:
            seen = row["report"]["targets"].get(target)
            if seen is None:
                continue
            acts = bool(seen["decision"]["reason"]) or seen["decision"]["kind"] != "none"
            found.append({
                "after_s": round(row["at"] - before, 1), "word": seen["word"], "decision": seen["decision"]["kind"], "acts": acts,
                "api": row["report"]["evidence"]["api"],
            })  # fmt: skip
            before = row["at"]
        return found

    def _follow(self, fault: Fault, result: Result, started: float, began: float) -> None:
        """Run by run, until the fault is detected and cured as required, or the runs are used up."""
        visible_s, lasts_s = fault.visible_s(self.settings), fault.lasts_s(self.context)
        result.proven = False
        visible_runs = after = 0
        while result.runs < fault.runs + (visible_s + lasts_s) / self.runs.period_s:
            report = self.runs.next()
            age_s = time.monotonic() - started
            result.runs += 1
            visible_runs += age_s >= visible_s
            if idle := fault.why_not_in_force(self.context):
                raise RuntimeError(f"run {result.runs}: {idle}")
            if lie := fault.never(report, self.context):
                result.problem = f"run {result.runs}: {lie}"
                result.verdicts.append(report["targets"]["api"]["word"])
                return
            target = report["targets"].get(fault.target, {"word": "unknown", "seen": 0, "needed": 1})
            result.verdicts.append(target["word"])
            result.restarts = self._restarts(began, fault.target)
            result.proven = result.proven or self._proves(fault, report)
            first = self._rows(
                "SELECT word, first_seen_at FROM incidents WHERE target = ? AND first_seen_at >= ?", fault.target, began
            )
            if result.detected_s is None and first and first[0]["word"] in fault.verdicts:
                # A run that restarted reports the state afterwards; what it detected is in the incident, with a time of
                # the checker's clock, which the fault may have shifted.
                result.detected_s, result.detected_runs = min(age_s, first[0]["first_seen_at"] - began), visible_runs
                if first[0]["word"] not in result.verdicts:
                    result.verdicts.insert(len(result.verdicts) - 1, first[0]["word"])
            elif result.detected_s is None and target["word"] in fault.verdicts and (result.proven or any(fault.restarts)):
                result.detected_s, result.detected_runs = age_s, visible_runs
            healthy_again = target["word"] == "healthy" and result.detected_s is not None and result.restarts >= min(fault.restarts)
            if fault.cured and healthy_again and result.recovered_s is None:
                result.recovered_s = age_s
            settled = result.recovered_s is not None if fault.cured else self._lasted(fault, result, age_s >= lasts_s)
            if settled:
                if result.proven and fault.cured:
                    return
                after += 1
                if after > RUNS_AFTER:
                    return

    def _lasted(self, fault: Fault, result: Result, long_enough: bool) -> bool:
        found = result.detected_s is not None
        return long_enough and found and result.restarts >= min(fault.restarts) and result.proven

    def _proves(self, fault: Fault, report: Report) -> bool:
        try:
            with contextlib.closing(Store.read_only(self.context.log_dir)) as store:
                return fault.proof(report, store)
        except (sqlite3.Error, OSError):  # the fault may have damaged it
            return False

    def _judge(self, fault: Fault, result: Result) -> str:
        seen = ", ".join(dict.fromkeys(result.verdicts))
        if result.detected_s is None:
            return f"not detected in {result.runs} runs ({seen})"
        if result.restarts not in fault.restarts:
            return f"{result.restarts} restarts instead of {' or '.join(map(str, fault.restarts))}"
        if fault.cured and result.recovered_s is None:
            return "detected but not cured"
        if not result.proven:
            return "the required evidence never appeared"
        if (result.detected_runs or 0) > fault.found_within:
            return f"detected only in run {result.detected_runs}"
        if not _follow_each_other(fault.in_order, result.verdicts):
            return f"the verdicts were {seen}, not {', then '.join(fault.in_order)}"
        if not any(fault.restarts) and fault.verdicts == UNAFFECTED and not set(result.verdicts) <= {"healthy", "busy", "degraded", "unknown"}:
            return f"wrong verdicts: {seen}"
        return ""

    def cron_removed(self) -> Result:
        """Without runs of the checker the server must report it as silent, and as watching again after a run."""
        result = Result(CRON_REMOVED, CRON_REMOVED_DESCRIPTION)
        try:
            self.settle()
            started = time.monotonic()
            result.detected_s = self._wait_for_checker("silent", started, self.settings.check_silent_s + 30)
            result.detected_runs = 1
            self.runs.begin()
            self.runs.next()
            if result.detected_s is not None:
                result.recovered_s = self._wait_for_checker("watching", started, self.settings.check_silent_s + 30 + 4 * self.runs.period_s)
        except (CheckerSilent, RuntimeError) as error:
            result.problem = str(error)
            return result
        finally:
            self.runs.end()
        if result.recovered_s is None:
            result.problem = "the server did not notice" if result.detected_s is None else "it still reports a silent checker"
        return result

    def _wait_for_checker(self, state: str, started: float, limit_s: float) -> float | None:
        """Seconds since `started` when the server reports this state of the checker; None if it does not within `limit_s`."""
        while time.monotonic() - started < limit_s:
            body = exchange(f"{self.settings.api_base_url}/health", 2.0).json() or {}
            if (body.get("checker") or {}).get("state") == state:
                return time.monotonic() - started
            time.sleep(0.5)
        return None

    def settle(self) -> None:
        """Restores a healthy service and resets the checker's state, so that no fault affects the next one."""
        self.context.clear_fault()
        self._script("start.sh")
        began = time.monotonic()
        deadline = began + max(HEALTHY_WITHIN_S, self.settings.start_deadline_s)
        stopped = False
        while True:
            self._reset_state()
            report = check(self.context, "--no-act")
            if all(target["word"] == "healthy" for target in report["targets"].values()):
                self._reset_state()
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service does not become healthy: {report['reasons']}")
            if not stopped and time.monotonic() > began + STILL_BAD_S:  # such as a page that was started with the fault's settings
                self._script("stop.sh")
                self._script("start.sh")
                stopped = True
            time.sleep(1)

    def _script(self, name: str) -> None:
        subprocess.run(["bash", str(ROOT / name)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False)

    def _reset_state(self) -> None:
        with contextlib.closing(Store.open(self.settings.log_dir)) as store, store.transaction():
            for target in PARTS:
                # The time of the last run stays: clock jumps are detected with it.
                moment = history.from_dict(store.get(f"history:{target}", {})).moment
                store.put(f"history:{target}", history.to_dict(history.History(moment=moment)))
                store.put(f"limiter:{target}", limiter.to_dict(limiter.reset()))
            store.put("thresholds", {})
            store.put("ladder", ladder.to_dict(ladder.Ladder()))  # the rungs of one fault would be missing for the next
            store.execute("DELETE FROM outbox")  # what a fault must tell, an earlier one may have told
            store.execute("DELETE FROM runs WHERE at > ?", time.time())  # of a clock that had jumped

    def _restarts(self, since: float, target: str) -> int:
        """Includes failed restarts."""
        sql = "SELECT outcome FROM actions WHERE kind = 'restart' AND target = ? AND at >= ? AND outcome != 'refused'"
        return len(self._rows(sql, target, since))

    def _rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """None from a store that the fault has damaged and no run has repaired yet."""
        try:
            with contextlib.closing(Store.read_only(self.context.log_dir)) as store:
                return store.rows(sql, *values)
        except (sqlite3.Error, OSError, ValueError):
            return []


def _follow_each_other(wanted: tuple[str, ...], seen: list[str]) -> bool:
    rest = iter(seen)
    return all(word in rest for word in wanted)


def main(settings: Settings, args: argparse.Namespace) -> int:
    order = [fault.name for fault in FAULTS] + [CRON_REMOVED]
    if args.list:
        _list()
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
    if args.under_cron and not schedule.cron_runs():
        print("No cron daemon is running. Start it: service cron start", file=sys.stderr)
        return WRONG_USE
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: each fault is undone
        signal.signal(number, _interrupt)
    context = FaultContext(settings, QUICK_S if args.quick else LONG_S)
    drill = Drill(settings, context, _runs(settings, args, context))
    was_installed = args.under_cron and schedule.installed("cron")
    drill.runs.end()
    try:
        return _drill(drill, args.faults, out, order)
    finally:
        drill.runs.end()
        if was_installed:
            schedule.put_cron_block(settings)


def _runs(settings: Settings, args: argparse.Namespace, context: FaultContext) -> Runs:
    if args.under_cron:
        return CronRuns(context)
    period_s = max(1.0, args.period or settings.check_period_s)
    os.environ["GLM_CHECK_PERIOD_S"] = str(period_s)
    return OwnRuns(context, period_s)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _list() -> None:
    for fault in FAULTS:
        print(f"{fault.name:24} {fault.description}")
    print(f"{CRON_REMOVED:24} {CRON_REMOVED_DESCRIPTION}")
    print("\nNot made by the drill, and tested elsewhere:")
    for name, why in NOT_HERE.items():
        print(f"{name:24} {why}")


def _drill(drill: Drill, names: list[str], out: Path | None, order: list[str]) -> int:
    results: dict[str, Result] = {}
    rows: dict[str, str] = {}
    for name, run in drill.all():
        if names and name not in names:
            continue
        results[name] = run()
        rows[name] = _row(results[name], drill.runs)
        _print(results[name])
        _write_trace(drill.settings, results[name])
        if out is not None:  # after each fault, so that a later failure loses no measurement
            table.update(out, rows, order)
    with contextlib.suppress(RuntimeError):  # which the result of the last fault says already
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


def _row(result: Result, runs: Runs) -> str:
    passed = f"pass: {result.note}" if result.note else "pass"
    pace = "each minute by cron" if isinstance(runs, CronRuns) else f"every {runs.period_s:g} s"
    cells = (
        result.name, result.description, _verdicts(result), _s(result.detected_s), _s(result.recovered_s), str(result.restarts),
        f"FAIL: {result.problem}" if result.problem else passed, f"{date.today().isoformat()}, {pace}",
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _verdicts(result: Result) -> str:
    return ", ".join(dict.fromkeys(result.verdicts)) or "-"


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"
