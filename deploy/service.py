"""The parts of start.sh and stop.sh that need more than a shell: ports, pid files, waiting for readiness, stopping.

    python -m deploy.service check  LOGS PART HOST PORT       0 may be started, 10 already running, 3 port in use
    python -m deploy.service record LOGS PART PID PORT OFFSET
    python -m deploy.service wait   LOGS SECONDS PART=HOST...  0 all answer (or are still loading), 1 one does not
    python -m deploy.service stop   LOGS SECONDS PART=PORT...  0 stopped, ports free; 1 not stopped; 3 port held by another process
    python -m deploy.service alive  LOGS PART...               0 all are running

Standard library only and no syntax newer than Python 3.8, so that stop.sh works when the environment is gone. Parts are `api` and `web`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from monitor.observe import ports, processes
from monitor.observe.http_exchange import exchange
from monitor.observe.processes import ProcessRecord

ROOT = Path(__file__).resolve().parent.parent
HEALTH = {"api": "/health", "web": "/_stcore/health"}
NAMES = {"api": "The API", "web": "The page"}
MAY_START, FAILED, PORT_IN_USE, RUNNING = 0, 1, 3, 10
LOG_LINES = 25
ANSWER_LIMIT_S = 2.0


def check(log_dir: Path, part: str, host: str, port: int) -> int:
    record = processes.read_record(log_dir, part)
    if record is not None and processes.is_running(record):
        if record.port == port:
            return RUNNING
        print(
            f"{NAMES[part]} is already running on port {record.port} (pid {record.pid}), but the settings now specify {port}."
            f" Run ./stop.sh {part} first.",
            file=sys.stderr,
        )
        return PORT_IN_USE
    reason = ports.why_taken(host, port)
    if reason:
        print(f"{NAMES[part]} cannot start: {reason}", file=sys.stderr)
        return PORT_IN_USE
    return MAY_START


def record(log_dir: Path, part: str, pid: int, port: int, log_offset: int) -> int:
    stat = processes.read_stat(pid)
    deadline = time.monotonic() + 5
    # Between fork and setsid the child is still in the session of the shell.
    while stat is not None and stat.session != pid and time.monotonic() < deadline:
        time.sleep(0.02)
        stat = processes.read_stat(pid)
    start_time = stat.start_time if stat else 0  # 0 matches no process: it has died already, which `wait` reports
    entry = ProcessRecord(pid, start_time, port, processes.boot_id(), str(ROOT), log_offset)
    processes.write_record(log_dir, part, entry)
    return 0


def wait(log_dir: Path, limit_s: float, hosts: dict[str, str]) -> int:
    """Polls until every part answers. Fails at once if a part dies or reports that its engine is dead."""
    deadline = time.monotonic() + limit_s
    waiting = dict(hosts)
    printed = dict.fromkeys(hosts, "")
    while waiting:
        for part, host in list(waiting.items()):
            entry = processes.read_record(log_dir, part)
            if entry is None or not processes.is_running(entry):
                return _fail(log_dir, part, entry, "exited right after it was started")
            state, detail = _answer(part, host, entry)
            if state == "up":
                del waiting[part]
            elif state == "dead":
                return _fail(log_dir, part, entry, f"reports that it cannot serve: {detail}")
            elif time.monotonic() >= deadline and state != "loading":
                return _fail(log_dir, part, entry, f"does not answer after {limit_s:g} s ({detail})")
            elif time.monotonic() >= deadline:
                print(f"{NAMES[part]} is up and still loads the model ({detail}). Its log: {log_dir / (part + '.log')}")
                del waiting[part]
            elif state == "loading" and detail != printed[part]:
                print(f"{NAMES[part]} loads the model: {detail}", flush=True)
                printed[part] = detail
        time.sleep(0.2 if waiting else 0)
    return 0


def stop(log_dir: Path, grace_s: float, configured_ports: dict[str, int]) -> int:
    worst = 0
    for part, configured_port in configured_ports.items():
        entry = processes.read_record(log_dir, part)
        port = entry.port if entry else configured_port
        if entry is not None and processes.members(entry):
            left = processes.end(entry, grace_s)
            if left:
                shown = ", ".join(f"pid {pid} ({processes.command_of(pid)})" for pid in left)
                print(f"{NAMES[part]} could not be killed: {shown}. Reboot the machine.", file=sys.stderr)
                worst = worst or FAILED
                continue
            print(f"{NAMES[part]} is stopped (pid {entry.pid})")
        else:
            print(f"{NAMES[part]} was not running")
        processes.record_path(log_dir, part).unlink(missing_ok=True)
        others = ports.listeners(port)
        if others:
            shown = ", ".join(listener.describe() for listener in others)
            print(f"Port {port} is still held by {shown}, which was not started by start.sh here", file=sys.stderr)
            worst = worst or PORT_IN_USE
    return worst


def alive(log_dir: Path, parts: list[str]) -> int:
    records = [processes.read_record(log_dir, part) for part in parts]
    return 0 if all(entry is not None and processes.is_running(entry) for entry in records) else FAILED


def _answer(part: str, host: str, entry: ProcessRecord) -> tuple[str, str]:
    """(`up`, `loading`, `dead` or `silent`, detail)."""
    pids = {listener.pid for listener in ports.listeners(entry.port)} - {None}
    ours = set(processes.members(entry))
    if pids and not pids & ours:
        return "silent", f"port {entry.port} belongs to pid {min(p for p in pids if p)}, which is another process"
    reply = exchange(f"http://{_reachable(host)}:{entry.port}{HEALTH[part]}", ANSWER_LIMIT_S)
    if part == "web":
        return ("up", "") if reply.status == 200 else ("silent", reply.detail or f"HTTP {reply.status}")
    health = reply.json() or {}
    state = health.get("state")
    if state is None:
        return "silent", reply.detail or f"HTTP {reply.status} without a state"
    if state in ("idle", "busy"):
        return "up", ""
    if state == "loading":
        return "loading", f"{100 * float(health.get('progress') or 0):.0f} %"
    return ("dead" if state == "dead" else "silent"), str(health.get("reason") or state)


def _reachable(host: str) -> str:
    """The address of a server bound to `host`, from this machine."""
    if host in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _fail(log_dir: Path, part: str, entry: ProcessRecord | None, why: str) -> int:
    path = log_dir / f"{part}.log"
    lines: list[str] = []
    if path.is_file():
        with path.open("rb") as file:
            file.seek(min(entry.log_offset if entry else 0, path.stat().st_size))
            lines = file.read()[-65536:].decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    print(f"{NAMES[part]} {why}. The last lines of {path}:", file=sys.stderr)
    for line in lines or ["(empty)"]:
        print(f"  {line}", file=sys.stderr)
    return FAILED


def _pairs(arguments: list[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in arguments)


def main(arguments: list[str]) -> int:
    command, log_dir, rest = arguments[0], Path(arguments[1]), arguments[2:]
    if command == "check":
        return check(log_dir, rest[0], rest[1], int(rest[2]))
    if command == "record":
        return record(log_dir, rest[0], int(rest[1]), int(rest[2]), int(rest[3]))
    if command == "wait":
        return wait(log_dir, float(rest[0]), _pairs(rest[1:]))
    if command == "stop":
        return stop(log_dir, float(rest[0]), {part: int(port) for part, port in _pairs(rest[1:]).items()})
    if command == "alive":
        return alive(log_dir, rest)
    raise SystemExit(__doc__)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
