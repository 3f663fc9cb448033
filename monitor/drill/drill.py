"""Breaks the running service on purpose, one fault after another, and measures how each is found and cured.

Every run of the checker is the real one, a process of its own. A fault passes if it is found within two runs of being
visible, is cured where a restart can cure it, and costs no restart where none can help. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from monitor.check import limits_of
from monitor.drill import faults
from monitor.drill import table as drill_table
from monitor.drill.faults import Bench
from monitor.judge import history, limiter
from monitor.judge.report import replace_file
from monitor.observe.exchange import exchange
from monitor.store.memory import PARTS
from monitor.store.store import Store
from settings import ROOT, Settings

GOOD, BAD, WRONG_USE = 0, 1, 2
FOUND_WITHIN_RUNS = 2
SLOW_S = 5.0
Report = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """`words`: what the checker must come to for `target`. `visible_s`: how long the fault hides by definition, such as
    the deadline of a step. `restarts`: exactly so many. `cured`: it must be good again while the fault is still made.
    `lasts_s`: how long a fault is held that must not be cured. `proof`: what else the report must show, once.
    `in_force`: asked after each run, why the fault was not truly made since the one before. `note`: said beside the result.
    """

    name: str
    what: str
    make: Callable[[Bench], AbstractContextManager[None]]
    words: tuple[str, ...]
    target: str = "api"
    restarts: int = 1
    cured: bool = True
    visible_s: Callable[[Settings], float] = lambda settings: 0.0
    lasts_s: Callable[[Bench], float] = lambda bench: 0.0
    proof: Callable[[Report, Store], bool] = lambda report, store: True
    in_force: Callable[[Bench], str] = lambda bench: ""
    note: Callable[[Bench], str] = lambda bench: ""
    runs: int = 40


def gpu_says(text: str) -> Callable[[Report, Store], bool]:
    return lambda report, store: text.lower() in json.dumps(report["evidence"]["gpu"]).lower()


def warns(name: str) -> Callable[[Report, Store], bool]:
    return lambda report, store: any(warning["name"] == name for warning in report["warnings"])


def undelivered(report: Report, store: Store) -> bool:
    return bool(store.rows("SELECT id FROM outbox WHERE channel = 'webhook' AND sent_at IS NULL AND error IS NOT NULL"))


def circuit_open(report: Report, store: Store) -> bool:
    return bool(report["targets"]["api"]["circuit_open"])


def in_memory(report: Report, store: Store) -> bool:
    return "memory" in report["check"]["store"]


def not_judged(report: Report, store: Store) -> bool:
    return bool(report["targets"]["api"]["rule"] == "clock_jump")


def slowed(report: Report, store: Store) -> bool:
    return any(answer["seconds"] >= SLOW_S for answer in report["evidence"]["api"]["answers"])


CALM = ("healthy", "busy")
FAULTS = (
    Fault("api-killed", "SIGKILL to the API", faults.kill, ("dead",)),
    Fault("page-killed", "SIGKILL to the page", partial(faults.kill, part="web"), ("dead",), "page"),
    Fault("api-frozen", "SIGSTOP to the API", faults.freeze, ("zombie",)),
    Fault("loop-blocked", "the event loop stands still", faults.ordered("block-loop", seconds=lambda b: 1800.0), ("zombie",)),
    Fault("step-hung", "a step of the engine never ends", faults.ordered("hang-step", asks=True), ("wedged",),
          visible_s=lambda s: s.stall_s),
    Fault("engine-dead", "the engine's thread loses its device", faults.ordered("kill-engine", asks=True), ("dead",)),
    Fault("pictures-broken", "pictures fail while text works", faults.ordered("blind"), ("broken",)),
    Fault("page-script-broken", "the page's script raises", faults.break_script, ("broken",), "page", cured=False),
    Fault("port-stolen", "the API is gone and a stranger has its port", faults.steal_port, ("dead",), restarts=0, cured=False),
    Fault("disk-full", "no byte free for the logs and the store", faults.fill_disk, CALM, restarts=0, cured=False, proof=in_memory),
    Fault("gpu-tool-hung", "nvidia-smi never answers", faults.stand_in_tool("exec sleep 600"), CALM, restarts=0, cured=False,
          proof=gpu_says("did not answer")),
    Fault("gpu-tool-garbage", "nvidia-smi prints nonsense", faults.stand_in_tool("echo 'Failed to initialize NVML: Unknown Error'"),
          CALM, restarts=0, cured=False, proof=gpu_says("gputil")),
    Fault("gpu-tool-gone", "no nvidia-smi and no NVML", faults.nothing, CALM, restarts=0, cured=False, proof=gpu_says("nvml")),
    Fault("slow-start", "killed, and its successor loads slowly", faults.start_slowly, ("dead",)),
    Fault("crash-loop", "killed, and every successor ends at once", faults.crash_on_start, ("dead",), restarts=3, cured=False,
          proof=circuit_open),
    Fault("clock-jump", "killed as the clock jumps by an hour: judged a run later", faults.jump_clock, ("dead",), proof=not_judged),
    Fault("long-prefill", "one step takes 60 s: must NOT restart", faults.ordered("slow-step", seconds=lambda b: min(60.0, b.long_s), asks=True),
          CALM, restarts=0, cured=False, lasts_s=lambda b: min(75.0, b.long_s + 15), proof=slowed),
    Fault("gpu-at-100", "every card at 100 % load: must NOT restart", faults.burn, CALM, restarts=0, cured=False,
          proof=gpu_says('"load_percent": 100')),
    Fault("memory-at-limit", "memory at its limit: must NOT restart", faults.fill_memory, CALM, restarts=0, cured=False,
          proof=warns("memory_used_percent")),
    Fault("alert-channel-down", "the alert channel takes nothing: must NOT restart", faults.cut_channel, CALM, restarts=0,
          cured=False, proof=undelivered),
    Fault("saturated", "the queue full for ten minutes: must NOT restart", faults.saturate, CALM, restarts=0, cured=False,
          lasts_s=lambda b: b.long_s, in_force=faults.queue_was_full, note=faults.how_full),
)  # fmt: skip
CRON_REMOVED, CRON_REMOVED_WHAT = "checker-gone", "cron was removed: the server notices its silent checker"


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
        self.bench = Bench(settings, long_s)

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
            with fault.make(self.bench):
                self._follow(fault, result, started, began)
                result.note = fault.note(self.bench)
                result.trace = self._trace(fault.target, began)
        except (OSError, RuntimeError, KeyError, subprocess.CalledProcessError) as error:
            result.problem = f"the fault was not truly made: {error}"
        self.bench.env.clear()
        if not result.problem:
            result.problem = self._judge(fault, result)
        return result

    def _trace(self, target: str, since: float) -> list[dict[str, Any]]:
        """Every look from the store: a run that cures looks twice, and only its second look is in its report.

        `acts` is false for that second look, which decides nothing.
        """
        with self._store() as opened:
            rows = opened.store.rows("SELECT at, report FROM runs WHERE at >= ? AND report IS NOT NULL ORDER BY id", since)
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
        """Run the checker period by period until the fault has shown what it must, or has had its time."""
        visible_s, lasts_s = fault.visible_s(self.settings), fault.lasts_s(self.bench)
        result.proven = False
        visible_runs = 0
        after = 0
        while result.runs < max(fault.runs, lasts_s / self.period_s + 3):
            due = time.monotonic() + self.period_s
            report = self.check()
            age_s = time.monotonic() - started
            result.runs += 1
            visible_runs += age_s >= visible_s
            if idle := fault.in_force(self.bench):
                raise RuntimeError(f"run {result.runs}: {idle}")
            target = report["targets"].get(fault.target, {"word": "unknown", "seen": 0, "needed": 1})
            result.words.append(target["word"])
            result.restarts = self._restarts(began, fault.target)
            with self._store() as store:
                result.proven = result.proven or fault.proof(report, store.store)
                first = store.store.rows(
                    "SELECT word, first_seen_at FROM incidents WHERE target = ? AND first_seen_at >= ?", fault.target, began
                )
            if result.found_s is None and first and first[0]["word"] in fault.words:
                # A run that cured shows the report of afterwards; what it found is in the incident.
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
                if after > 3:  # and goes on looking: nothing more may happen
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
            return "what the fault must show besides was never seen"
        if (result.found_runs or 0) > FOUND_WITHIN_RUNS and fault.name != "crash-loop":
            return f"found only in run {result.found_runs}"
        if not fault.restarts and fault.words == CALM and not set(result.words) <= {"healthy", "busy", "degraded", "unknown"}:
            return f"wrong verdicts: {', '.join(dict.fromkeys(result.words))}"
        return ""

    def cron_removed(self) -> Result:
        """Nothing runs the checker any more: the server must say so, and stop saying so when it is back."""
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
        """Good again and forgotten: each fault is met by a checker that knows of no other."""
        self.bench.take_order_back()
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
        with self._store() as opened, opened.store.transaction():
            for target in PARTS:
                # But not when it last looked: without that no jump of the clock can be seen.
                moment = history.from_dict(opened.store.get(f"history:{target}", {})).moment
                opened.store.put(f"history:{target}", history.to_dict(history.History(moment=moment)))
                opened.store.put(f"limiter:{target}", limiter.to_dict(limiter.reset()))
            opened.store.put("thresholds", {})
            opened.store.execute("DELETE FROM outbox WHERE sent_at IS NULL")

    def check(self, *words: str) -> Report:
        """One real run. A run that another one holds up is waited for."""
        for _ in range(60):
            done = subprocess.run(
                [sys.executable, str(ROOT / "health_check.py"), "run", *words], cwd=ROOT, env={**os.environ, **self.bench.env},
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
        """Tried ones count too: a process that dies again was restarted."""
        with self._store() as opened:
            rows = opened.store.rows(
                "SELECT outcome FROM actions WHERE kind = 'restart' AND target = ? AND at >= ? AND outcome != 'refused'", target, since
            )
        return len(rows)

    def _store(self) -> _Opened:
        return _Opened(self.settings.log_dir)


class _Opened:
    def __init__(self, log_dir: Path) -> None:
        self.store = Store.open(log_dir)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()


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
            drill_table.check(out)
    except (drill_table.NoPlace, OSError) as error:
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
        _say(results[name])
        _record(drill.settings, results[name])
        if out is not None:  # after each one: what was measured is not lost with what comes after
            drill_table.renew(out, rows, order)
    drill.settle()
    print("\n" + "\n".join(drill_table.lines(rows, order)))
    return BAD if any(result.problem for result in results.values()) else GOOD


def _say(result: Result) -> None:
    said = f"FAIL  {result.name}: {result.problem}" if result.problem else f"pass  {result.name}: {result.note or 'as it must'}"
    print(f"{said}  (found {_s(result.found_s)}, recovered {_s(result.recovered_s)}, restarts {result.restarts}, "
          f"words {_words(result)})", flush=True)  # fmt: skip


def _record(settings: Settings, result: Result) -> None:
    """The trace, for replay."""
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
