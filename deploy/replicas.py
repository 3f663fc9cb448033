"""Which replicas start.sh runs: takes `--gpus` and `--replicas`, refuses what contradicts them, and keeps them in `.env`.

    python -m deploy.replicas check                      0 the set of the settings may be started, 2 not, and why
    python -m deploy.replicas keep gpus=0,1 replicas=2   the same for another set, which is then written to `.env`

In `.env`, so that a later ./start.sh, ./stop.sh and the checker under cron know the same set.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from deploy import keys
from monitor.observe import process_search, processes, unit
from settings import ENV_FILE, PREFIX, REPLICAS, Settings, SettingsError, load

NAMES = {"gpus": "GPUS", "replicas": "REPLICAS"}
NGINX_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"  # cron's PATH has neither


def nginx() -> str:
    """The path of the program; empty if it is not installed."""
    return shutil.which("nginx", path=NGINX_PATH) or ""


def why_not(settings: Settings) -> str:
    """Empty if this set may be started; otherwise what is missing, or what runs that is not part of it."""
    count, log_dir = settings.replica_count, settings.log_dir
    if count > 1 and not nginx():
        return "nginx is not installed, and several replicas need one in front of them. On Debian and Ubuntu: apt-get install nginx"
    if count > 1 and unit.owner_of("api"):
        return (
            f"systemd owns the API ({unit.owner_of('api')}), as one process. For {count} replicas undo that first:"
            " ./stop.sh && python health_check.py uninstall --with systemd"
        )
    if count > 1 and _runs(log_dir, "api"):
        return f"The API runs as one process, and the settings say {count} replicas. Stop it first: ./stop.sh api"
    if count == 1 and _runs(log_dir, "front"):
        return "The API runs as several replicas, and the settings say one. Stop them first: ./stop.sh api"
    others = [number for number in running(log_dir) if number >= count or count == 1]
    if others:
        names = ", ".join(f"replica {number}" for number in others)
        return f"{names} of an earlier start still runs, and the settings say {count}. Stop it first: ./stop.sh api"
    moved = [number for number in range(count) if count > 1 and _card_of(log_dir, number) not in (None, _card(settings, number))]
    if moved:
        return f"replica {moved[0]} runs on card {_card_of(log_dir, moved[0])!r}, and {PREFIX}GPUS={settings.gpus} says another. Stop it first: ./stop.sh api"
    return ""


def running(log_dir: Path) -> list[int]:
    """The numbers of the replicas that run."""
    return [number for number in known(log_dir) if _runs(log_dir / REPLICAS / str(number), "api")]


def known(log_dir: Path) -> list[int]:
    """The numbers of the replicas that ran at some time."""
    folder = log_dir / REPLICAS
    return sorted(int(entry.name) for entry in folder.iterdir() if re.fullmatch(r"\d{1,3}", entry.name)) if folder.is_dir() else []


def _runs(log_dir: Path, kind: str) -> bool:
    record = processes.read_record(log_dir, kind)
    return (record is not None and processes.is_running(record)) or bool(process_search.search(kind, log_dir))


def _card(settings: Settings, number: int) -> str:
    return settings.for_replica(number).gpus


def _card_of(log_dir: Path, number: int) -> str | None:
    """The card on which the replica runs, by what it was started with; None if it does not run."""
    record = processes.read_record(log_dir / REPLICAS / str(number), "api")
    if record is None or not processes.is_running(record):
        return None
    return str(process_search.mark_of(record.pid).get("card", ""))


def keep(given: dict[str, str]) -> str:
    """Writes the set to `.env`. Empty if it was done; otherwise why not. Raises SettingsError for values that cannot be."""
    for name, value in given.items():
        inherited = os.environ.get(f"{PREFIX}{NAMES[name]}", "")
        if inherited and inherited != value:
            return (
                f"--{name} {value}: {PREFIX}{NAMES[name]} is {inherited!r} in the environment, which wins over {ENV_FILE}. Unset it there"
            )
    for name in NAMES:
        if name not in given and os.environ.get(f"{PREFIX}{NAMES[name]}"):
            return f"--{next(iter(given))}: {PREFIX}{NAMES[name]} is set in the environment, which wins over {ENV_FILE}. Unset it there"
    settings = load(gpus=given.get("gpus", ""), replicas=given.get("replicas") or _count(given["gpus"]))
    problem = why_not(settings)
    if problem:
        return problem
    path = ENV_FILE.resolve()
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    wanted = {"GPUS": settings.gpus} if settings.gpus else {"REPLICAS": str(settings.replicas)}
    changed = with_lines(text, wanted)
    if changed != text:
        try:
            keys.write(path, changed)
        except OSError as error:
            return f"{path} cannot be written: {error.strerror}"
        print(f"Written to {path}: " + ", ".join(f"{PREFIX}{name}={value}" for name, value in wanted.items()))
    return ""


def _count(gpus: str) -> int:
    return len(gpus.split(","))


def with_lines(text: str, wanted: dict[str, str]) -> str:
    """The file's text with these two settings as they are wanted, and without a line of the one that is not."""
    for name in NAMES.values():
        line = re.compile(rf"^[ \t]*(?:export[ \t]+)?{PREFIX}{name}[ \t]*=.*(?:\n|$)", re.MULTILINE)
        value = f"{PREFIX}{name}={wanted[name]}\n" if name in wanted else ""
        if value and not line.search(text):
            text = (text + "\n" if text and not text.endswith("\n") else text) + value
            continue
        first = [value]
        text = line.sub(lambda _, first=first: first.pop() if first else "", text)  # type: ignore[misc]
    return text


def main(arguments: list[str]) -> int:
    command, given = arguments[0], dict(argument.split("=", 1) for argument in arguments[1:])
    try:
        problem = keep(given) if command == "keep" else why_not(load())
    except SettingsError as error:
        problem = str(error)
    if problem:
        print(problem, file=sys.stderr)
    return 2 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
