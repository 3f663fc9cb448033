"""The units with which systemd owns the API and the page: it alone starts them, and starts again what ended or stands still.

The API's watchdog is fed by the progress of its engine (api/health/watchdog.py). What a stop on purpose leaves behind,
`logs/<part>.stopped`, holds here as well: a unit whose part is marked is skipped.
"""

from __future__ import annotations

import os
import pwd
import shlex
import sys
from pathlib import Path

from dotenv import dotenv_values

from monitor.observe import processes, unit
from settings import ENV_FILE, ROOT, Settings

AGAIN_S = 5  # between an end and the next start
KILL_MARGIN_S = 20  # beyond the delay and the time to drain
DOWNLOAD_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE")
INVALID_SETTINGS = 2  # exit code of the API
WHAT = {"api": "The API of GLM-4.6V-Flash-WEB", "web": "The page of GLM-4.6V-Flash-WEB"}
EMPTIED = (Path("/tmp"), Path("/var/tmp"))  # of which each unit has its own

# What neither server needs. The API is left the devices (a card), and memory that is written and then executed (kernels that
# are compiled while it runs).
HARDENING = """NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""
HARDENING_OF = {"api": "", "web": "PrivateDevices=yes\nDevicePolicy=closed\nSystemCallFilter=~@privileged @resources\n"}


def server_units(settings: Settings, environment: dict[str, str] | None = None) -> dict[str, str]:
    """The text of each unit by its name. `environment`: of this process, for the folders of downloads and for conda."""
    return {unit.NAMES[part]: _server_unit(part, settings, dict(os.environ) if environment is None else environment) for part in unit.NAMES}


def user() -> str:
    """The owner of the project's folder, as whom the servers and the checker run."""
    return processes.user_name(ROOT.stat().st_uid)


def why_not_here() -> str:
    """Why no unit can run the project where it is; empty if one can."""
    hidden = next((folder for folder in EMPTIED if ROOT.is_relative_to(folder)), None)
    return f"systemd gives each server a {hidden} of its own, so the project must not be in it. Move {ROOT} elsewhere" if hidden else ""


def _server_unit(part: str, settings: Settings, environment: dict[str, str]) -> str:
    return f"""[Unit]
Description={WHAT[part]}
After=network-online.target
Wants=network-online.target
# As often as the checker may restart it, and the first start; then it is left as failed.
StartLimitIntervalSec=3600
StartLimitBurst={settings.restarts_per_hour + 1}

[Service]
User={user()}
WorkingDirectory={unit.escaped(str(ROOT))}
{_start_of(part, settings)}
# A stop on purpose holds until start.sh ends it.
ExecCondition=/bin/sh -c {_word(f"test ! -e {shlex.quote(str(processes.stop_mark(settings.log_dir, part)))}")}
ExecStart={_word(sys.executable)} -m deploy.service become {part}
StandardOutput=append:{unit.escaped(str(settings.log_dir / f"{part}.log"))}
StandardError=inherit
Environment={" ".join(_word(f"{name}={value}") for name, value in _variables(environment).items())}
Restart={"always" if settings.cure == "restart" and settings.restarts_per_hour else "no"}
RestartSec={AGAIN_S}
RestartPreventExitStatus={INVALID_SETTINGS}
KillMode=mixed
TimeoutStopSec={settings.stop_s + KILL_MARGIN_S:g}
LimitNOFILE=65536
ReadWritePaths={" ".join(_word(f"-{folder}") for folder in _writable(part, settings, environment))}
{HARDENING}{HARDENING_OF[part]}
[Install]
WantedBy=multi-user.target
"""


def _start_of(part: str, settings: Settings) -> str:
    if part == "web":
        return "Type=exec"
    return f"""# Ready when it can answer. The limit of a start is extended for as long as loading moves.
Type=notify
NotifyAccess=main
TimeoutStartSec={settings.start_deadline_s:g}
# Fed by progress; the API lengthens it for a step that takes longer.
WatchdogSec={settings.stall_s:g}"""


def _variables(environment: dict[str, str]) -> dict[str, str]:
    """PYTHONFAULTHANDLER: the watchdog ends it with SIGABRT, upon which Python writes all stacks to the log."""
    kept = ("CONDA_PREFIX", "CONDA_DEFAULT_ENV", *DOWNLOAD_VARIABLES)
    return {
        "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONFAULTHANDLER": "1",
        **{name: environment[name] for name in kept if environment.get(name)},
    }  # fmt: skip


def _writable(part: str, settings: Settings, environment: dict[str, str]) -> list[Path]:
    """The log folder; for the API also where models, compiled kernels and what is known of them are kept."""
    if part == "web":
        return [settings.log_dir]
    home = Path(pwd.getpwnam(user()).pw_dir)
    from_file = dotenv_values(ENV_FILE) if ENV_FILE.is_file() else {}
    folders = [environment.get(name) or from_file.get(name) for name in DOWNLOAD_VARIABLES]
    return [settings.log_dir, home / ".cache", *(Path(folder).expanduser() for folder in folders if folder)]


def _word(text: str) -> str:
    """One word of a line, whatever is in it."""
    return '"' + unit.escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$") + '"'
