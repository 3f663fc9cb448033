"""Schedules health_check.py: a systemd timer where systemd runs, else a marked block in the crontab, one for each folder.

Both are idempotent; uninstall removes exactly what install wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from monitor import units as server_units
from monitor.observe import unit
from settings import ROOT, Settings

GOOD, BAD = 0, 1
BEGIN, END = f"# >>> glm health_check {ROOT} >>>", f"# <<< glm health_check {ROOT} <<<"
UNNAMED = "# >>> glm health_check >>>", "# <<< glm health_check <<<"  # the markers of earlier versions
UNIT = "glm-health-check"
JITTER_S = 10
NO_CRONTAB = "crontab is missing or refuses this user. Debian: apt-get install cron"


def install(settings: Settings, how: str, servers: bool = False) -> int:
    """`servers`: systemd owns the API and the page as well."""
    if servers and server_units.why_not_here():
        print(server_units.why_not_here(), file=sys.stderr)
        return BAD
    if servers and settings.replica_count > 1:
        print(f"A unit of systemd runs one API, and there are {settings.replica_count} replicas (GLM_GPUS, GLM_REPLICAS). Without --servers "
              "only the checker is scheduled, which restarts them", file=sys.stderr)  # fmt: skip
        return BAD
    way = "systemd" if servers else choose(how)
    if not way:
        print(f"Neither systemd nor cron is available. Run the checker in the background instead: {in_background()}", file=sys.stderr)
        return BAD
    return _install_systemd(settings, servers) if way == "systemd" else _install_cron(settings)


def uninstall(settings: Settings, how: str) -> int:
    ways = [how] if how != "auto" else [way for way in ("systemd", "cron") if installed(way)]
    if not ways:
        print("Nothing is installed.")
        return GOOD
    return max(_uninstall_systemd() if way == "systemd" else _uninstall_cron() for way in ways)


def choose(how: str) -> str:
    if how != "auto":
        return how
    if systemd_runs() and os.geteuid() == 0:
        return "systemd"
    return "cron" if shutil.which("crontab") else ""


def systemd_runs() -> bool:
    return unit.MANAGER.is_dir()


def installed(way: str) -> bool:
    if way == "systemd":
        return (_unit_folder() / f"{UNIT}.timer").exists()
    table = read_crontab() or ""
    return without_block(table) != table


def command(variables: Mapping[str, str] | None = None) -> str:
    """The shell command that cron and systemd run. start.sh chooses its Python by conda's two variables."""
    conda = {name: os.environ[name] for name in ("CONDA_PREFIX", "CONDA_DEFAULT_ENV") if os.environ.get(name)}
    words = [f"{name}={shlex.quote(value)}" for name, value in {**conda, **(variables or {})}.items()]
    words += [shlex.quote(sys.executable), shlex.quote(str(ROOT / "health_check.py")), "run", "--quiet"]
    return " ".join(words)


def in_background() -> str:
    return f"nohup {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'health_check.py'))} loop >/dev/null 2>&1 &"


def jitter_s() -> int:
    """Constant per machine and folder, so that a fleet does not check in the same second."""
    seed = f"{os.uname().nodename}{ROOT}".encode()
    return hashlib.sha256(seed).digest()[0] % JITTER_S


def cron_block(settings: Settings, variables: Mapping[str, str] | None = None) -> str:
    """`variables` are added to the environment of the runs."""
    minutes = max(1, round(settings.check_period_s / 60))
    when = "* * * * *" if minutes == 1 else f"*/{min(minutes, 59)} * * * *"
    log = shlex.quote(str(settings.log_dir / "health_check.log"))
    # Output goes to a file, because cron would mail it every minute. The folder may have been removed.
    folder = shlex.quote(str(settings.log_dir))
    line = f"{when} sleep {jitter_s()}; mkdir -p {folder}; {command(variables)} >/dev/null 2>>{log}"
    if "%" in line:
        line = line.replace("%", r"\%")  # cron reads a bare % as a line break
    return f"{BEGIN}\n{line}\n{END}\n"


def read_crontab() -> str | None:
    """None if crontab is missing or fails; empty if this user has no table."""
    if shutil.which("crontab") is None:
        return None
    done = subprocess.run(["crontab", "-l"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    return "" if "no crontab" in done.stderr.lower() else None


def without_block(text: str) -> str:
    """The text without the block of this folder. A block without its end marker is left alone, so that nothing behind it is
    removed."""
    kept: list[str] = []
    lines = text.splitlines(keepends=True)
    while lines:
        length = _length_of_block(lines)
        if not length:
            kept.append(lines[0])
        del lines[: length or 1]
    return "".join(kept)


def _length_of_block(lines: list[str]) -> int:
    """Lines of the block that begins at the first line; 0 if none of this folder begins there."""
    for begin, end in ((BEGIN, END), UNNAMED):
        if lines[0].strip() == begin:
            for number, line in enumerate(lines):
                if line.strip() == end:
                    ours = begin == BEGIN or str(ROOT / "health_check.py") in "".join(lines[:number])
                    return number + 1 if ours else 0
    return 0


@contextlib.contextmanager
def _changing_the_crontab() -> Iterator[None]:
    """Other folders of this user change the same table: reading and writing it must not be interleaved with theirs."""
    path = Path(tempfile.gettempdir()) / f"glm-crontab-{os.geteuid()}.lock"
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w")
    except OSError:  # without a lock there is a small risk, without a block no checks at all
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install_cron(settings: Settings) -> int:
    code = put_cron_block(settings)
    if code != GOOD:
        return code
    settings.log_dir.mkdir(parents=True, exist_ok=True)
    print(f"cron runs it for {getpass.getuser()} from the next minute: {command()}")
    if not cron_runs():
        print(f"But no cron daemon is running. Start it (service cron start), or run instead: {in_background()}", file=sys.stderr)
        return BAD
    return GOOD


def put_cron_block(settings: Settings, variables: Mapping[str, str] | None = None) -> int:
    """Writes or replaces this folder's block."""
    with _changing_the_crontab():
        old = read_crontab()
        if old is None:
            print(NO_CRONTAB, file=sys.stderr)
            return BAD
        rest = without_block(old)
        if rest and not rest.endswith("\n"):
            rest += "\n"
        return GOOD if _write_crontab(rest + cron_block(settings, variables)) else BAD


def _uninstall_cron() -> int:
    with _changing_the_crontab():
        old = read_crontab()
        if old is None:
            print(NO_CRONTAB, file=sys.stderr)
            return BAD
        rest = without_block(old)
        if rest == old:
            print("cron: not installed.")
            return GOOD
        if not _write_crontab(rest):
            return BAD
    print("cron: removed.")
    return GOOD


def _write_crontab(text: str) -> bool:
    words = ["crontab", "-"] if text.strip() else ["crontab", "-r"]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"crontab refused it: {done.stderr.strip()}", file=sys.stderr)
    return done.returncode == 0


def cron_runs() -> bool:
    names = {"cron", "crond", "supercronic", "busybox"}
    return any(process.info["name"] in names for process in psutil.process_iter(["name"]))


def units(settings: Settings, servers: bool = False) -> dict[str, str]:
    """The text of each unit by its name. With `servers` the checker runs as their user, whose processes alone it can judge."""
    as_user = f"User={server_units.user()}\n" if servers else ""
    service = f"""[Unit]
Description=Health check of GLM-4.6V-Flash-WEB

[Service]
{as_user}Type=oneshot
WorkingDirectory={ROOT}
ExecStart=/bin/sh -c {shlex.quote("exec env " + command())}
SuccessExitStatus=1 3
# Servers that a run restarts must outlive it.
KillMode=process
TimeoutStartSec=900
"""
    timer = f"""[Unit]
Description=Health check of GLM-4.6V-Flash-WEB, every {settings.check_period_s:g} s

[Timer]
OnBootSec={30 + jitter_s()}
OnUnitActiveSec={settings.check_period_s:g}
AccuracySec=1s

[Install]
WantedBy=timers.target
"""
    return {f"{UNIT}.service": service, f"{UNIT}.timer": timer, **(server_units.server_units(settings) if servers else {})}


def _unit_folder() -> Path:
    return unit.FOLDER


def _install_systemd(settings: Settings, servers: bool) -> int:
    if not systemd_runs():
        print("systemd is not running on this machine. Use: health_check.py install --with cron", file=sys.stderr)
        return BAD
    try:
        for name, text in units(settings, servers or owns_servers()).items():
            (_unit_folder() / name).write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"{error.filename} cannot be written: {error.strerror}. Run it as root, or: install --with cron", file=sys.stderr)
        return BAD
    for words in (["daemon-reload"], ["enable", "--now", f"{UNIT}.timer"]):
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"systemctl {' '.join(words)}: {done.stderr.strip()}", file=sys.stderr)
            return BAD
    print(f"systemd runs it every {settings.check_period_s:g} s: systemctl list-timers {UNIT}.timer")
    return _hand_over(settings) if servers else GOOD


def owns_servers() -> bool:
    return any(unit.owner_of(part) for part in unit.NAMES)


def _hand_over(settings: Settings) -> int:
    """From now on the servers are systemd's. What runs is not ended here: that is for whoever knows who is being served."""
    settings.log_dir.mkdir(parents=True, exist_ok=True)
    for name in unit.NAMES.values():
        problem = unit.systemctl("enable", name)
        if problem:
            print(f"systemctl enable {name}: {problem}", file=sys.stderr)
            return BAD
    print(f"systemd owns {' and '.join(unit.NAMES.values())}, as {server_units.user()}. To start them, or to take over what runs: ./start.sh --restart")
    return GOOD


def _uninstall_systemd() -> int:
    if not installed("systemd"):
        print("systemd: not installed.")
        return GOOD
    subprocess.run(["systemctl", "disable", "--now", f"{UNIT}.timer"], capture_output=True, check=False)
    owned = [name for part, name in unit.NAMES.items() if unit.owner_of(part)]
    for name in owned:  # the servers run on, and are start.sh's again
        subprocess.run(["systemctl", "disable", name], capture_output=True, check=False)
    for name in (f"{UNIT}.service", f"{UNIT}.timer", *owned):
        (_unit_folder() / name).unlink(missing_ok=True)
    subprocess.run(["systemctl", "daemon-reload"], capture_output=True, check=False)
    print("systemd: removed.")
    return GOOD
