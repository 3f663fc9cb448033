"""python -m bench.killed_checker: kills the checker with SIGKILL at every moment of a restart, and looks at what the next runs make of it.

In a copy of the project the API (or the page) is killed, the checker begins to restart it, and is killed `--step` later each
time, until it is done before it is killed. After each kill the checker runs again, as cron would. A row fails if that run does
not end with a healthy service, if there is not exactly one API and one page, if a start.sh is left over, or if restarts are
counted that started nothing, or started and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.project_copy import ProjectCopy, started_copy
from monitor.store.state import CheckerState
from monitor.store.store import Store

SETTINGS = {
    "GLM_CHECK_PERIOD_S": "1", "GLM_RESTARTS_PER_HOUR": "10000", "GLM_RESTARTS_PER_DAY": "10000", "GLM_STABLE_S": "0", "GLM_LOG_LEVEL": "info",
}  # fmt: skip
HEALTHY_WITHIN_S = 90.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.killed_checker", description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=float, default=0.05, metavar="S")
    parser.add_argument("--first", type=float, default=0.0, metavar="S", help="the first moment, after the start of the checker")
    parser.add_argument("--target", choices=("api", "web"), default="api")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the copy is stopped all the same
    failed = moments = 0
    with started_copy(SETTINGS, "killed") as copy:
        _make_healthy(copy)
        delay_s = given.first
        while True:
            problem, survived = one(copy, given.target, delay_s)
            moments += 1
            failed += bool(problem)
            if problem:
                _make_healthy(copy)
            print(f"{'FAIL' if problem else 'pass'}  killed after {delay_s:.2f} s{f': {problem}' if problem else ''}", flush=True)
            if survived:
                break
            delay_s += given.step
    print(f"{moments} moments every {given.step:g} s, {failed} failed; the whole restart takes {delay_s:.1f} s")
    return 1 if failed else 0


def one(copy: ProjectCopy, part: str, delay_s: float) -> tuple[str, bool]:
    """(what is wrong, whether the checker was done before it was to be killed)."""
    _forget_restarts(copy)
    old = _pids(copy, part)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    launches = _launches(copy, part)
    checker = subprocess.Popen(
        copy.command("run"), cwd=copy.folder, env=copy.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    survived = False
    try:
        checker.wait(delay_s)
        survived = True
    except subprocess.TimeoutExpired:
        checker.kill()
        checker.wait()
    report = _check(copy)
    target = "api" if part == "api" else "page"
    problems = []
    if any(found["word"] != "healthy" for found in report["targets"].values()):
        problems.append(f"the next run said {({name: found['rule'] for name, found in report['targets'].items()})}")
    for name in ("api", "web"):
        if len(_pids(copy, name)) != 1:
            problems.append(f"{len(_pids(copy, name))} processes of {name}")
    if left := _scripts(copy):
        problems.append(f"left over: {left}")
    with contextlib.closing(Store.read_only(copy.log_dir)) as store:
        counted = len(CheckerState.load(store, "").limiters[target].restarts)
        rows = [row for row in store.actions() if row["kind"] == "restart" and row["target"] == target and row["outcome"] == "done"]
    started = _launches(copy, part) - launches
    if not started == counted == len(rows):
        problems.append(f"{started} processes were started, {counted} restarts counted, {len(rows)} in the audit log")
    return "; ".join(problems), survived


def _check(copy: ProjectCopy) -> dict:
    done = copy.run(*copy.command("run"))
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"targets": {"api": {"word": "none", "rule": f"no report, exit {done.returncode}: {done.stderr[-200:]}"}}}


def _make_healthy(copy: ProjectCopy) -> None:
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while any(found["word"] != "healthy" for found in _check(copy)["targets"].values()):
        if time.monotonic() > deadline:
            raise RuntimeError("the service does not become healthy")
        _forget_restarts(copy)
        copy.run("bash", "start.sh")
        time.sleep(1)


def _forget_restarts(copy: ProjectCopy) -> None:
    with contextlib.closing(Store.open(copy.log_dir)) as store, store.transaction():
        for name in ("history:api", "history:page", "limiter:api", "limiter:page"):
            store.put(name, {})
        store.execute("DELETE FROM actions")


def _launches(copy: ProjectCopy, part: str) -> int:
    """How often the part was started so far, by its own log."""
    words = rb"event=start " if part == "api" else rb"page address="
    return len(re.findall(words, b"".join(path.read_bytes() for path in copy.log_dir.glob(f"{part}.log*"))))


def _pids(copy: ProjectCopy, part: str) -> list[int]:
    return [pid for pid, command in _processes(copy.folder) if f" -m {part}.server" in command]


def _scripts(copy: ProjectCopy) -> list[str]:
    return [command for _, command in _processes(copy.folder) if "start.sh" in command or "deploy.service" in command]


def _processes(folder: Path) -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if Path(os.readlink(entry / "cwd")) == folder and "State:\tZ" not in (entry / "status").read_text():
                    found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")))
    return found


if __name__ == "__main__":
    sys.exit(main())
