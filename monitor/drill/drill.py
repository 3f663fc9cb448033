"""Breaks the running service on purpose, one fault after another, and measures how each is detected and cured.

Every run of the checker is the real one, a process of its own. A fault passes if it is found within two runs of being
visible, is cured where a restart can cure it, and causes no restart where none can help. Prints a table.
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
from monitor.drill.catalogue import CALM, CRON_REMOVED, CRON_REMOVED_WHAT, FAULTS, Fault, Report
from monitor.drill.faults import FaultContext
from monitor.judge import history, limiter
from monitor.observe.exchange import exchange
from monitor.store.memory import PARTS
from monitor.store.store import Store
from monitor.tell.report import replace_file
from settings import ROOT, Settings

GOOD, BAD, WRONG_USE = 0, 1, 2
FOUND_WITHIN_RUNS = 2


@dataclass
class Result:
    name: str
    what: str
    found_s: float | None = None
    found_runs: int | None = None
    recovered_s: float | None = None
    restarts: int = 0
    words: list[str] = field(default_factory=list)
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
        result = Result(fault.name, fault.what)
        self.settle()
        began = time.time()
        started = time.monotonic()
        try:
            with fault.make(self.context):
                self._follow(fault, result, started, began)
                result.note = fault.note(self.context)
                result.trace = self._trace(fault.target, began)
        except (OSError, RuntimeError, KeyError, subprocess.CalledProcessError) as error:
            result.problem = f"the fault was not truly made: {error}"
        self.context.env.clear()
        if not result.problem:
            result.problem = self._judge(fault, result)
        return result

    def _trace(self, target: str, since: float) -> list[dict[str, Any]]:
        """Every observation from the store: a run that restarts observes twice, and its report holds only the second one.

        `acts` is false for that second observation, which decides nothing.
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
        """Runs the checker period by period until the fault is detected and cured as required, or its time is over."""
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
            if idle := fault.in_force(self.context):
                raise RuntimeError(f"run {result.runs}: {idle}")
            target = report["targets"].get(fault.target, {"word": "unknown", "seen": 0, "needed": 1})
            result.words.append(target["word"])
            result.restarts = self._restarts(began, fault.target)
            with self._store() as store:
                result.proven = result.proven or fault.proof(report, store)
                first = store.rows(
                    "SELECT word, first_seen_at FROM incidents WHERE target = ? AND first_seen_at >= ?", fault.target, began
                )
            if result.found_s is None and first and first[0]["word"] in fault.words:
                # A run that restarted reports the state afterwards; what it detected is in the incident.
                # Its time is by the checker's clock, which a fault may have shifted.
                result.found_s, result.found_runs = min(age_s, first[0]["first_seen_at"] - began), visible_runs
                result.words.insert(0, first[0]["word"])
            elif result.found_s is None and target["word"] in fault.words and (result.proven or fault.restarts):
                result.found_s, result.found_runs = age_s, visible_runs
            if fault.cured and result.restarts and target["word"] == "healthy" and result.recovered_s is None:
                result.recovered_s = age_s
            if fault.cured and result.recovered_s is not None:
                return
            if not fault.cured and age_s >= lasts_s and result.restarts >= fault.restarts and result.proven:
                after += 1
                if after > 3:  # a few more runs: nothing more may happen
                    return
            time.sleep(max(0.0, due - time.monotonic()))

    def _judge(self, fault: Fault, result: Result) -> str:
        if result.found_s is None:
            return f"not found in {result.runs} runs ({', '.join(dict.fromkeys(result.words))})"
        if result.restarts != fault.restarts:
            return f"{result.restarts} restarts instead of {fault.restarts}"
        if fault.cured and result.recovered_s is None:
            return "found but not cured"
        if not result.proven:
            return "the evidence that the fault requires never appeared"
        if (result.found_runs or 0) > FOUND_WITHIN_RUNS and fault.name != "crash-loop":
            return f"found only in run {result.found_runs}"
        if not fault.restarts and fault.words == CALM and not set(result.words) <= {"healthy", "busy", "degraded", "unknown"}:
            return f"wrong verdicts: {', '.join(dict.fromkeys(result.words))}"
        return ""

    def cron_removed(self) -> Result:
        """Nothing runs the checker any more: the server must report it, and stop reporting it when the checker is back."""
        result = Result(CRON_REMOVED, CRON_REMOVED_WHAT)
        self.settle()
        started = time.monotonic()
        limit_s = self.settings.check_silent_s
        while time.monotonic() - started < limit_s + 30:
            state = self._checker_state()
            if state == "silent":
                result.found_s, result.found_runs = time.monotonic() - started, 1
                break
            time.sleep(1)
        self.check()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and result.found_s is not None:
            if self._checker_state() == "watching":
                result.recovered_s = time.monotonic() - started
                break
            time.sleep(0.2)
        if result.recovered_s is None:
            result.problem = "the server did not notice" if result.found_s is None else "it still says silent"
        return result

    def _checker_state(self) -> str:
        body = exchange(f"{self.settings.api_base_url}/health", 2.0).json() or {}
        return str((body.get("checker") or {}).get("state"))

    def settle(self) -> None:
        """Restores a healthy service and resets the checker's memory, so that no fault influences the next one."""
        self.context.clear_fault()
        subprocess.run(["bash", str(ROOT / "start.sh")], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        deadline = time.monotonic() + self.settings.start_deadline_s
        while True:
            self._forget()
            report = self.check("--no-act")
            if all(target["word"] == "healthy" for target in report["targets"].values()):
                self._forget()
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service does not become healthy: {report['reasons']}")
            time.sleep(1)

    def _forget(self) -> None:
        with self._store() as store, store.transaction():
            for target in PARTS:
                # But not the time of its last run: without it no jump of the clock can be detected.
                moment = history.from_dict(store.get(f"history:{target}", {})).moment
                store.put(f"history:{target}", history.to_dict(history.History(moment=moment)))
                store.put(f"limiter:{target}", limiter.to_dict(limiter.reset()))
            store.put("thresholds", {})
            store.execute("DELETE FROM outbox WHERE sent_at IS NULL")

    def check(self, *words: str) -> Report:
        """One real run; waits while another run holds the lock."""
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
        """Failed ones count too: a process that dies again was restarted."""
        with self._store() as store:
            rows = store.rows(
                "SELECT outcome FROM actions WHERE kind = 'restart' AND target = ? AND at >= ? AND outcome != 'refused'", target, since
            )
        return len(rows)

    def _store(self) -> contextlib.closing[Store]:
        return contextlib.closing(Store.open(self.settings.log_dir))


def main(settings: Settings, given: argparse.Namespace) -> int:
    order = [fault.name for fault in FAULTS] + [CRON_REMOVED]
    if given.list:
        for fault in FAULTS:
            print(f"{fault.name:20} {fault.what}")
        print(f"{CRON_REMOVED:20} {CRON_REMOVED_WHAT}")
        return GOOD
    unknown = [name for name in given.faults if name not in order]
    if unknown:
        print(f"No such fault: {', '.join(unknown)}. There are: {', '.join(order)}", file=sys.stderr)
        return WRONG_USE
    if not given.yes or not settings.test_faults:
        print(
            "The drill kills, freezes and starves the service in this folder. Not in production.\n"
            "Set GLM_TEST_FAULTS=true in .env, run ./stop.sh and ./start.sh, then: health_check.py drill --yes", file=sys.stderr,
        )  # fmt: skip
        return WRONG_USE
    out = Path(given.out) if given.out else None
    try:
        if out is not None:
            table.check(out)
    except (table.MarkersMissing, OSError) as error:
        print(f"--out: {error}", file=sys.stderr)
        return WRONG_USE
    period_s = max(1.0, given.period or settings.check_period_s)
    os.environ["GLM_CHECK_PERIOD_S"] = str(period_s)
    drill = Drill(settings, period_s, 8.0 if given.quick else 600.0)
    results: dict[str, Result] = {}
    rows: dict[str, str] = {}
    for name, make in drill.all():
        if given.faults and name not in given.faults:
            continue
        results[name] = make()
        rows[name] = _row(results[name], period_s)
        _print(results[name])
        _write_trace(drill.settings, results[name])
        if out is not None:  # after each one, so that a failure later on loses no measurement
            table.update(out, rows, order)
    drill.settle()
    print("\n" + "\n".join(table.lines(rows, order)))
    return BAD if any(result.problem for result in results.values()) else GOOD


def _print(result: Result) -> None:
    line = f"FAIL  {result.name}: {result.problem}" if result.problem else f"pass  {result.name}: {result.note or 'as it must'}"
    print(f"{line}  (found {_s(result.found_s)}, recovered {_s(result.recovered_s)}, restarts {result.restarts}, "
          f"words {_words(result)})", flush=True)  # fmt: skip


def _write_trace(settings: Settings, result: Result) -> None:
    """The trace of the evidence, for replay."""
    found = {"limits": asdict(limits_of(settings)), "restarts": result.restarts, "runs": result.trace}
    replace_file(settings.log_dir / "drill" / f"{result.name}.json", json.dumps(found, ensure_ascii=False))


def _row(result: Result, period_s: float) -> str:
    passed = f"pass: {result.note}" if result.note else "pass"
    cells = (
        result.name, result.what, _words(result), _s(result.found_s), _s(result.recovered_s), str(result.restarts),
        f"FAIL: {result.problem}" if result.problem else passed, f"{date.today().isoformat()}, every {period_s:g} s",
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _words(result: Result) -> str:
    return ", ".join(dict.fromkeys(result.words)) or "-"


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"
