"""python -m bench.drill: the whole drill in several copies of the project at once, at the real pace under cron.

Each copy has its own ports, logs and crontab entry, and takes the next of the faults when it is done with one, the longest
first. The rows go into one table. Where no cron daemon runs, one is started for the time of the drill.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.project_copy import ProjectCopy, started_copy
from monitor.drill import table
from monitor.drill.catalogue import CRON_REMOVED, FAULTS
from monitor.drill.context import FaultContext
from settings import Settings

# Loading, silence and the queue reach their limits sooner than by default; all that a restart depends on is as it is.
SETTINGS = {"GLM_TEST_FAULTS": "true", "GLM_QUEUE_SIZE": "8", "GLM_START_DEADLINE_S": "120", "GLM_CHECK_SILENT_S": "120"}
CRON_PERIOD_S = 60.0
ORDER = [fault.name for fault in FAULTS] + [CRON_REMOVED]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drill", description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="*", help="names of faults (default: all)")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--out", type=Path, help="update the rows in the table of this file")
    parser.add_argument("--traces", type=Path, help="a folder for the evidence of each run")
    parser.add_argument("--period", type=float, default=0.0, metavar="SECONDS", help="run the checker at this pace, without cron")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.faults if name not in ORDER]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}. Known: {', '.join(ORDER)}")
    if given.out is not None:
        table.check(given.out)
    expected = expected_minutes(given.period or CRON_PERIOD_S)
    names = sorted(given.faults or ORDER, key=lambda name: -expected[name])
    print(f"{len(names)} faults in {given.copies} copies, about {_wall_minutes(names, expected, given.copies):.0f} minutes", flush=True)
    work = _Work(deque(names), given)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _cron(needed=not given.period):
        threads = [threading.Thread(target=work.in_a_copy, args=(number,)) for number in range(1, given.copies + 1)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # also after Ctrl-C: each drill undoes its fault, each copy is stopped
            work.stop()
            for thread in threads:
                thread.join()
    print("\n" + "\n".join(table.lines(work.rows, ORDER)))
    missing = [name for name in names if name not in work.rows]
    failed = [name for name, row in work.rows.items() if "| FAIL" in row]
    print(f"\n{len(work.rows) - len(failed)} passed, {len(failed)} failed {failed or ''}, {len(missing)} not run {missing or ''}")
    return 1 if failed or missing else 0


def expected_minutes(period_s: float) -> dict[str, float]:
    """By fault, if all goes well."""
    settings = Settings(_env_file=None, **{name.removeprefix("GLM_").lower(): value for name, value in SETTINGS.items()})  # type: ignore[arg-type]
    context = FaultContext(settings)
    found = {fault.name: fault.expected_s(settings, context, period_s) / 60 for fault in FAULTS}
    return found | {CRON_REMOVED: (settings.check_silent_s + 2 * period_s) / 60}


def _wall_minutes(names: list[str], expected: dict[str, float], copies: int) -> float:
    """With the longest first, each to the copy that is free first."""
    busy_until = [0.0] * copies
    for name in names:
        first = busy_until.index(min(busy_until))
        busy_until[first] += expected[name]
    return max(busy_until)


@dataclass
class _Work:
    names: deque[str]
    given: argparse.Namespace
    rows: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    drills: list[subprocess.Popen[str]] = field(default_factory=list)
    stopped: bool = False

    def in_a_copy(self, number: int) -> None:
        with started_copy(SETTINGS, f"drill-{number}") as copy:
            while (name := self._next()) is not None:
                began = time.monotonic()
                output = self._drill(copy, name)
                minutes = (time.monotonic() - began) / 60
                with self.lock:
                    self._keep(copy, name, output, f"copy {number}, {minutes:.1f} min")

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            self.names.clear()
            for drill in self.drills:
                if drill.poll() is None:
                    drill.terminate()

    def _next(self) -> str | None:
        with self.lock:
            return self.names.popleft() if self.names else None

    def _drill(self, copy: ProjectCopy, name: str) -> str:
        pace = ["--period", str(self.given.period)] if self.given.period else ["--under-cron"]
        words = copy.command("drill", "--yes", *pace, "--out", str(copy.folder / "rows.md"), name)
        with self.lock:
            if self.stopped:
                return ""
            drill = subprocess.Popen(
                words, cwd=copy.folder, env=copy.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self.drills.append(drill)
        return drill.communicate()[0]

    def _keep(self, copy: ProjectCopy, name: str, output: str, where: str) -> None:
        row = table.rows(copy.folder / "rows.md").get(name)
        if row is None:
            print(f"FAIL  {name}: the drill ended without a result ({where})\n{output[-2000:]}", flush=True)
            return
        self.rows[name] = row
        print(f"{next((line for line in output.splitlines() if name in line), name)}  [{where}]", flush=True)
        if self.given.out is not None:
            table.update(self.given.out, {name: row}, ORDER)
        trace = copy.log_dir / "drill" / f"{name}.json"
        if self.given.traces is not None and trace.exists():
            self.given.traces.mkdir(parents=True, exist_ok=True)
            (self.given.traces / trace.name).write_bytes(trace.read_bytes())


@contextmanager
def _cron(needed: bool) -> Iterator[None]:
    """The machine's cron daemon, or one that runs as long as this. A second daemon ends at once, because of the first one's lock."""
    if not needed:
        yield
        return
    daemon = subprocess.Popen(["cron", "-f"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1)
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait()


if __name__ == "__main__":
    sys.exit(main())
