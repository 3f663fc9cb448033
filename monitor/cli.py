"""The operator's command line. Exit codes: 0 healthy, 1 unhealthy or failed, 2 usage error, 3 another run is in progress,
130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import getpass
import os
import random
import re
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import settings as settings_module
from monitor import swap
from monitor.tell import notices, report
from monitor.tell.log import warn, write_line
from settings import Settings, SettingsError

if TYPE_CHECKING:
    from monitor.act.lock import Lock

GOOD, BAD, WRONG_USE, LOCKED, INTERRUPTED = 0, 1, 2, 3, 130
WATCH_EVERY_S = 1.0
FILES = 256
LAST_RESORT_S = 5.0  # after the deadline


def main(arguments: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    command = args.command or "run"
    try:
        settings, problem = settings_module.load_or_last_good()
    except SettingsError as error:
        if command in ("run", "loop"):
            _publish_unknown(f"invalid settings: {error}", settings_module.last_good_path().parent)
        else:
            print(f"invalid settings: {error}", file=sys.stderr)
        return BAD
    if problem and command != "run":  # a run says it in its report
        print(notices.settings_fallback(problem)["en"], file=sys.stderr)
    journal = swap.journal_of(settings_module.ENV_FILE)
    if command != "restore" and os.path.lexists(journal):
        warn(f"a restore of a backup is not finished ({journal}). Unless it runs: ./stop.sh; python health_check.py restore")
    try:
        # Each command imports what it needs, which keeps the memory of the scheduled run small.
        return int(COMMANDS[command](settings, args))
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="health_check.py", description="Check the service and restart what a restart can cure.")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND")
    one = sub.add_parser("run", help="one run, as cron does it (the default command)")
    one.add_argument("--no-act", action="store_true", help="observe and record only: no restarts, no operators' requests")
    one.add_argument("--quiet", action="store_true", help="print nothing while the service is healthy")
    loop = sub.add_parser("loop", help="run every GLM_CHECK_PERIOD_S seconds, where cron is not available")
    loop.add_argument("--times", type=int, default=0, help="stop after this many runs")
    status = sub.add_parser("status", help="show the last report; works while everything else is down")
    status.add_argument("--json", action="store_true")
    watch = sub.add_parser("watch", help="show the last report, refreshed in the terminal")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    watch.add_argument("--times", type=int, default=0)
    history = sub.add_parser("history", help="show flips, incidents, actions and availability")
    history.add_argument("--hours", type=float, default=24.0)
    history.add_argument("--json", action="store_true")
    text = sub.add_parser("report", help="show one incident as text that can be forwarded")
    text.add_argument("incident", nargs="?", help="incident id (default: the newest)")
    sub.add_parser("doctor", help="check the setup of the checker itself")
    drill = sub.add_parser("drill", help="inject faults into the running service and measure detection and recovery")
    drill.add_argument("faults", nargs="*", help="names of faults (default: all)")
    drill.add_argument("--list", action="store_true", help="list the faults and exit")
    drill.add_argument("--yes", action="store_true", help="confirm that this is not production")
    drill.add_argument("--period", type=float, default=0.0, metavar="SECONDS", help="time between two runs (default: GLM_CHECK_PERIOD_S)")
    drill.add_argument("--under-cron", action="store_true", help="let the real cron run the checker each minute; the drill only watches")
    drill.add_argument("--quick", action="store_true", help="make long faults last seconds instead of minutes")
    drill.add_argument("--out", default="", metavar="FILE",
                       help="update the rows of these faults in the table of this file")
    install = sub.add_parser("install", help="schedule the checker: systemd timer where systemd runs, else cron")
    install.add_argument("--with", dest="how", choices=("auto", "cron", "systemd"), default="auto")
    install.add_argument("--servers", action="store_true", help="systemd owns the API and the page as well: it starts and restarts them")
    install.add_argument("--show", action="store_true", help="print the units of systemd instead")
    remove = sub.add_parser("uninstall", help="undo install")
    remove.add_argument("--with", dest="how", choices=("auto", "cron", "systemd"), default="auto")
    backup = sub.add_parser("backup", help="save settings, keys, chats and history in one file, while the service runs")
    backup.add_argument("--to", type=Path, default=None, metavar="FOLDER", help="default: backups in GLM_LOG_DIR")
    backup.add_argument("--keep", type=int, default=None, metavar="N", help="delete all but the newest N backups there; without it none")
    restore = sub.add_parser("restore", help="put a backup back, once all of it has been checked")
    restore.add_argument("archive", type=Path, nargs="?", help="without it, only finish a restore that was cut off")
    restore.add_argument("--into", type=Path, default=None, metavar="FOLDER", help="below this folder, not over this installation")
    restore.add_argument("--replace", action="store_true", help="set aside what is in the way")
    restore.add_argument("--without-env", action="store_true", help="leave .env as it is, and restore the rest")
    restore.add_argument("--check", action="store_true", help="only check the archive")
    pause = sub.add_parser("pause", help="suspend restarts; runs and alerts go on")
    pause.add_argument("--minutes", type=float, default=None, help="default: until resume")
    pause.add_argument("--reason", default="")
    sub.add_parser("resume", help="end pause, silence and maintenance")
    for name, what in (("maintenance", "suspend restarts and alerts"), ("silence", "suspend alerts")):
        window = sub.add_parser(name, help=f"{what} for a number of minutes")
        window.add_argument("--minutes", type=float, required=True)
        window.add_argument("--reason", default="")
    reset = sub.add_parser("reset", help="close the circuit breaker, so that restarts are allowed again")
    reset.add_argument("target", nargs="?", default="all", type=_target_or_all, help="all (the default), api, page, front or api/NUMBER")
    reset.add_argument("--reason", required=True, help="what was repaired, for the audit log")
    restart = sub.add_parser("restart", help="restart one target: save evidence, restart, verify")
    restart.add_argument("target", type=_target, help="api, page; with several replicas also front and api/NUMBER")
    return parser


def _target(text: str) -> str:
    if not re.fullmatch(r"api(/\d{1,2})?|page|front", text):
        raise argparse.ArgumentTypeError(f"must be api, page, front or api/NUMBER. Given: {text}")
    return text


def _target_or_all(text: str) -> str:
    return text if text == "all" else _target(text)


def _run(settings: Settings, args: argparse.Namespace) -> int:
    from monitor import check, replicas
    from monitor.act.lock import Lock

    _allow_files()
    lock = Lock(settings.log_dir)
    try:
        _end_at_deadline(settings, lock)
    except RuntimeError as error:  # no more threads; the next run ends this one then
        warn(f"nothing keeps the deadline of this run: {error}")
    holder = lock.acquire(settings.check_budget_s, "checking")
    if holder:
        warn(f"skipped: {holder}")
        return LOCKED
    try:
        one_run = replicas.run if settings.replica_count > 1 else check.run
        outcome = one_run(settings, random.SystemRandom(), lock, _clock(settings), act=not getattr(args, "no_act", False))
        _keep_settings()
    except Exception as error:
        short = _short_of(error)
        if short:
            _publish_unknown(f"checker_blind: the checker cannot judge, because {short}", settings.log_dir)
            return BAD
        with contextlib.suppress(OSError):
            traceback.print_exc()
        _publish_unknown(f"the checker failed: {type(error).__name__}: {error}; see health_check.log", settings.log_dir)
        return BAD
    finally:
        lock.release()
    if not (getattr(args, "quiet", False) and outcome.report["service_healthy"]):
        _print(outcome.report)
    return GOOD if outcome.report["service_healthy"] else BAD


def _short_of(error: Exception) -> str:
    """What the system refuses the checker, which is nobody's mistake in the code; empty for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"it may not open more files (ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}): {error.strerror}"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN)):
        return f"the system gives it no more memory or processes: {error or 'out of memory'}"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return f"the system gives it no more threads: {error}"
    return ""


def _allow_files() -> None:
    """As many open files as it may allow itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES and (hard > soft or hard < 0):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard) if hard >= 0 else FILES, hard))


def _publish_unknown(reason: str, log_dir: Path) -> None:
    """So that nobody takes yesterday's report for today's."""
    unknown = report.unknown(reason)
    _print(unknown)
    try:
        report.write(unknown, log_dir)
    except OSError as error:
        warn(f"{log_dir / report.FILE_NAME} could not be written: {error.strerror or error}")


def _print(summary: dict[str, Any]) -> None:
    """The exit code is the verdict's, also where nobody reads the report."""
    error = write_line(sys.stdout, report.to_json(summary))
    if error is not None and not isinstance(error, BrokenPipeError):
        warn(f"the report could not be printed: {error.strerror or error}")


def _keep_settings() -> None:
    """Keeps the settings of this run for a run with an invalid .env."""
    try:
        settings_module.keep_last_good()
    except SettingsError:
        return  # the report says it
    except OSError as error:
        warn(f"{settings_module.last_good_path()} could not be written: {error.strerror or error}")


def _clock(settings: Settings) -> Any:
    """The system clock, shifted by the drill if GLM_TEST_FAULTS is on."""
    from dataclasses import replace

    from monitor.observe.observe import now

    shift_s = float(os.environ.get("DRILL_CLOCK_S", "0")) if settings.test_faults else 0.0
    return lambda: replace(now(), wall=now().wall + shift_s) if shift_s else now()


def _end_at_deadline(settings: Settings, lock: Lock) -> None:
    """Ends this run at its deadline; otherwise the next run would kill it. Not by a signal: Python handles those in the main
    thread, which may never come back from the kernel."""
    lock.begin(settings.check_budget_s)

    def watch() -> None:
        while not lock.expired():
            # For a main thread that does not even let this one run; it needs no Python.
            faulthandler.dump_traceback_later(lock.left_s + LAST_RESORT_S, exit=True, file=2)
            time.sleep(min(WATCH_EVERY_S, max(0.0, lock.left_s)))
        warn(f"ended: the run took longer than {settings.check_budget_s:g} s")
        os._exit(BAD)

    threading.Thread(target=watch, name="deadline", daemon=True).start()


def _loop(settings: Settings, args: argparse.Namespace) -> int:
    """Each run is a process of its own, so that a leak or a hang does not outlive it."""
    import subprocess

    stop = {"now": False}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.update(now=True))
    script = str(settings_module.ROOT / "health_check.py")
    done, due = 0, time.monotonic()
    while not stop["now"] and (not args.times or done < args.times):
        with (settings_module.ROOT / os.devnull).open("w") as nowhere:
            subprocess.run([sys.executable, script, "run", "--quiet"], stdout=nowhere, check=False)
        done += 1
        due = max(due + settings.check_period_s, time.monotonic())
        while not stop["now"] and time.monotonic() < due and (not args.times or done < args.times):
            time.sleep(min(0.2, max(0.0, due - time.monotonic())))
    return GOOD


def _status(settings: Settings, args: argparse.Namespace) -> int:
    from monitor.tell import status

    return status.show(settings, as_json=args.json)


def _watch(settings: Settings, args: argparse.Namespace) -> int:
    from monitor.tell import status

    return status.watch(settings, args.every, args.times)


def _history(settings: Settings, args: argparse.Namespace) -> int:
    from monitor.tell import incident_history

    return incident_history.show(settings, args.hours, args.json)


def _report(settings: Settings, args: argparse.Namespace) -> int:
    from monitor.tell import incident_history

    return incident_history.show_incident(settings, args.incident)


def _doctor(settings: Settings, args: argparse.Namespace) -> int:
    from monitor import doctor

    return doctor.examine(settings)


def _drill(settings: Settings, args: argparse.Namespace) -> int:
    from monitor.drill import drill

    if settings.replica_count > 1:
        print(f"The drill is of one API, and there are {settings.replica_count} replicas (GLM_GPUS, GLM_REPLICAS)", file=sys.stderr)
        return WRONG_USE
    return drill.main(settings, args)


def _install(settings: Settings, args: argparse.Namespace) -> int:
    from monitor import schedule

    if args.show:
        print("\n".join(f"# {name}\n{text}" for name, text in schedule.units(settings, args.servers).items()))
        return GOOD
    return schedule.install(settings, args.how, args.servers)


def _uninstall(settings: Settings, args: argparse.Namespace) -> int:
    from monitor import schedule

    return schedule.uninstall(settings, args.how)


def _backup(settings: Settings, args: argparse.Namespace) -> int:
    from monitor import backup

    if args.keep is not None and args.keep < 1:
        print(f"--keep must be >= 1; without it nothing is deleted. Given: {args.keep}", file=sys.stderr)
        return WRONG_USE
    return backup.save_command(settings, _from_here(args.to) if args.to else settings.log_dir / "backups", args.keep or 0)


def _restore(settings: Settings, args: argparse.Namespace) -> int:
    from monitor import backup

    into = _from_here(args.into) if args.into else None
    archive = _from_here(args.archive) if args.archive else None
    return backup.restore_command(settings, archive, into, args.replace, args.check, not args.without_env)


def _from_here(path: Path) -> Path:
    """A path as the shell means it: this program has changed to the project's folder."""
    return Path(os.environ.get("PWD", "")) / path


def _request(settings: Settings, args: argparse.Namespace) -> int:
    """Inserts the same row as the console, so that there is one audit log."""
    from monitor.store.store import Store

    now = time.time()
    minutes = getattr(args, "minutes", None)
    arguments = {"until": None if minutes is None else now + 60 * minutes, "reason": getattr(args, "reason", "")}
    target = getattr(args, "target", "")
    store = Store.open(settings.log_dir)
    if store.lost:
        print(store.lost, file=sys.stderr)
        return BAD
    number = store.add_request(now, f"{getpass.getuser()} at a terminal", args.command, target, arguments)
    store.close()
    print(f"Request {number}: {args.command} {target}".rstrip() + ". It takes effect with the next run.")
    return GOOD


def _request_and_run(settings: Settings, args: argparse.Namespace) -> int:
    """Inserts the request and runs the checker at once."""
    code = _request(settings, args)
    return code or _run(settings, args)


COMMANDS = {
    "run": _run, "loop": _loop, "status": _status, "watch": _watch, "history": _history, "report": _report,
    "doctor": _doctor, "drill": _drill, "install": _install, "uninstall": _uninstall, "pause": _request, "resume": _request,
    "backup": _backup, "restore": _restore, "maintenance": _request, "silence": _request, "reset": _request, "restart": _request_and_run,
}  # fmt: skip
