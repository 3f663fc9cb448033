"""The operator's command line: parses, calls, prints. Exit codes: 0 good, 1 not good, 2 wrong use, 3 another run is at work,
130 ended by Ctrl-C.
"""

from __future__ import annotations

import argparse
import getpass
import os
import random
import signal
import sys
import time
from types import FrameType
from typing import Any

import settings as settings_module
from monitor.tell import report
from monitor.tell.log import warn
from settings import Settings, SettingsError

GOOD, BAD, WRONG_USE, TAKEN, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: list[str]) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    command = given.command or "run"
    try:
        settings = settings_module.load()
    except SettingsError as error:
        print(report.to_json(report.unknown(f"the settings cannot be used: {error}")))
        return BAD
    try:
        # Each command imports what it needs, so that the run of every minute stays small.
        return int(COMMANDS[command](settings, given))
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="health_check.py", description="Checks the service and restarts what a restart can cure.")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND")
    one = sub.add_parser("run", help="one run, as cron does it (also without a command)")
    one.add_argument("--no-act", action="store_true", help="observe and record only: no restart, no operator's request")
    one.add_argument("--quiet", action="store_true", help="print nothing if the service is healthy")
    loop = sub.add_parser("loop", help="run every GLM_CHECK_PERIOD_S seconds where there is no cron")
    loop.add_argument("--times", type=int, default=0, help="stop after this many runs")
    status = sub.add_parser("status", help="the last report as text; works while everything else is down")
    status.add_argument("--json", action="store_true")
    watch = sub.add_parser("watch", help="the same, refreshed in the terminal")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    watch.add_argument("--times", type=int, default=0)
    history = sub.add_parser("history", help="flips, incidents, actions and availability")
    history.add_argument("--hours", type=float, default=24.0)
    history.add_argument("--json", action="store_true")
    text = sub.add_parser("report", help="one incident as a text for people")
    text.add_argument("incident", nargs="?", help="its id; the newest without one")
    sub.add_parser("doctor", help="check that the checker itself is set up correctly")
    drill = sub.add_parser("drill", help="break the running service on purpose and measure detection and recovery")
    drill.add_argument("faults", nargs="*", help="names of faults; all without one")
    drill.add_argument("--list", action="store_true", help="list the faults and exit")
    drill.add_argument("--yes", action="store_true", help="confirm that this is not production")
    drill.add_argument("--period", type=float, default=0.0, metavar="SECONDS", help="time between two runs (GLM_CHECK_PERIOD_S)")
    drill.add_argument("--quick", action="store_true", help="long faults last seconds instead of minutes")
    drill.add_argument("--out", default="", metavar="FILE",
                       help="update the rows of these faults in the table of this file")
    install = sub.add_parser("install", help="run every minute: systemd timer where systemd runs, else cron")
    install.add_argument("--with", dest="how", choices=("auto", "cron", "systemd"), default="auto")
    remove = sub.add_parser("uninstall", help="remove what install set up")
    remove.add_argument("--with", dest="how", choices=("auto", "cron", "systemd"), default="auto")
    pause = sub.add_parser("pause", help="keep checking and alerting, but restart nothing")
    pause.add_argument("--minutes", type=float, default=None, help="until resume if not given")
    pause.add_argument("--reason", default="")
    sub.add_parser("resume", help="end pause, silence and maintenance")
    for name, what in (("maintenance", "restart nothing and send no alerts"), ("silence", "send no alerts")):
        window = sub.add_parser(name, help=f"{what} for some minutes")
        window.add_argument("--minutes", type=float, required=True)
        window.add_argument("--reason", default="")
    reset = sub.add_parser("reset", help="allow restarts again after the circuit has opened")
    reset.add_argument("target", nargs="?", default="all", choices=("all", "api", "page"))
    reset.add_argument("--reason", required=True, help="what was repaired; it goes into the audit log")
    restart = sub.add_parser("restart", help="restart one target: save evidence, restart, verify")
    restart.add_argument("target", choices=("api", "page"))
    return parser


def _run(settings: Settings, given: argparse.Namespace) -> int:
    from monitor import check
    from monitor.act.lock import Lock

    lock = Lock(settings.log_dir)
    taken = lock.take(settings.check_budget_s, "checking")
    if taken:
        warn(f"skipped: {taken}")
        return TAKEN
    _end_at_deadline(settings, lock)
    try:
        outcome = check.run(settings, random.SystemRandom(), lock, _clock(settings), act=not getattr(given, "no_act", False))
    finally:
        lock.release()
    if not (getattr(given, "quiet", False) and outcome.report["service_healthy"]):
        print(report.to_json(outcome.report))
    return GOOD if outcome.report["service_healthy"] else BAD


def _clock(settings: Settings) -> Any:
    """The system's clock; the drill may shift it where GLM_TEST_FAULTS allows the drill."""
    from dataclasses import replace

    from monitor.observe.observe import now

    shift_s = float(os.environ.get("DRILL_CLOCK_S", "0")) if settings.test_faults else 0.0
    return lambda: replace(now(), wall=now().wall + shift_s) if shift_s else now()


def _end_at_deadline(settings: Settings, lock: Any) -> None:
    """Ends this run when its declared time is over; otherwise the next run would."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if lock.expired():
            warn(f"ended: the run took longer than {settings.check_budget_s:g} s")
            os._exit(BAD)
        signal.alarm(5)

    signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(max(1, int(settings.check_budget_s)))


def _loop(settings: Settings, given: argparse.Namespace) -> int:
    """Each run is a process of its own: a leak or a hang ends with it."""
    import subprocess

    stop = {"now": False}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.update(now=True))
    script = str(settings_module.ROOT / "health_check.py")
    done, due = 0, time.monotonic()
    while not stop["now"] and (not given.times or done < given.times):
        with (settings_module.ROOT / os.devnull).open("w") as nowhere:
            subprocess.run([sys.executable, script, "run", "--quiet"], stdout=nowhere, check=False)
        done += 1
        due = max(due + settings.check_period_s, time.monotonic())
        while not stop["now"] and time.monotonic() < due and (not given.times or done < given.times):
            time.sleep(min(0.2, max(0.0, due - time.monotonic())))
    return GOOD


def _status(settings: Settings, given: argparse.Namespace) -> int:
    from monitor.tell import status

    return status.show(settings, as_json=given.json)


def _watch(settings: Settings, given: argparse.Namespace) -> int:
    from monitor.tell import status

    return status.watch(settings, given.every, given.times)


def _history(settings: Settings, given: argparse.Namespace) -> int:
    from monitor.tell import incident_history

    return incident_history.show(settings, given.hours, given.json)


def _report(settings: Settings, given: argparse.Namespace) -> int:
    from monitor.tell import incident_history

    return incident_history.show_incident(settings, given.incident)


def _doctor(settings: Settings, given: argparse.Namespace) -> int:
    from monitor import doctor

    return doctor.examine(settings)


def _drill(settings: Settings, given: argparse.Namespace) -> int:
    from monitor.drill import drill

    return drill.main(settings, given)


def _install(settings: Settings, given: argparse.Namespace) -> int:
    from monitor import schedule

    return schedule.install(settings, given.how)


def _uninstall(settings: Settings, given: argparse.Namespace) -> int:
    from monitor import schedule

    return schedule.uninstall(settings, given.how)


def _request(settings: Settings, given: argparse.Namespace) -> int:
    """Inserts the same row as the page does, so there is one audit log."""
    from monitor.store.store import Store

    now = time.time()
    minutes = getattr(given, "minutes", None)
    arguments = {"until": None if minutes is None else now + 60 * minutes, "reason": getattr(given, "reason", "")}
    target = getattr(given, "target", "")
    store = Store.open(settings.log_dir)
    if store.lost:
        print(store.lost, file=sys.stderr)
        return BAD
    number = store.ask(now, f"{getpass.getuser()} at a terminal", given.command, target, arguments)
    store.close()
    print(f"Request {number}: {given.command} {target}".rstrip() + ". In force from the next run of the checker on.")
    return GOOD


def _request_and_run(settings: Settings, given: argparse.Namespace) -> int:
    """Requests it, and runs the checker at once."""
    code = _request(settings, given)
    return code or _run(settings, given)


COMMANDS = {
    "run": _run, "loop": _loop, "status": _status, "watch": _watch, "history": _history, "report": _report,
    "doctor": _doctor, "drill": _drill, "install": _install, "uninstall": _uninstall, "pause": _request, "resume": _request,
    "maintenance": _request, "silence": _request, "reset": _request, "restart": _request_and_run,
}  # fmt: skip
