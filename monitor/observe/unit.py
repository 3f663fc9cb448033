"""Whether systemd owns a server: the unit that `health_check.py install --servers` wrote for this folder.

Where there is one, systemd alone starts that server. Standard library only, and no syntax newer than Python 3.8, because
start.sh and stop.sh ask it too.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from monitor.observe.processes import ROOT

NAMES = {"api": "glm-api.service", "web": "glm-web.service"}
FOLDER = Path("/etc/systemd/system")
MANAGER = Path("/run/systemd/system")  # exists where systemd is the service manager (sd_booted(3))
LIMIT_S = 150.0


def owner_of(part: str, root: Path = ROOT) -> str:
    """The name of the unit; empty if the server is not systemd's to start."""
    if part not in NAMES or not MANAGER.is_dir():
        return ""
    try:
        text = (FOLDER / NAMES[part]).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    return NAMES[part] if f"\nWorkingDirectory={escaped(str(root))}\n" in text else ""


def escaped(text: str) -> str:
    """In a unit file a % begins a specifier."""
    return text.replace("%", "%%")


def systemctl(*words: str, limit_s: float = LIMIT_S) -> str:
    """Empty if it was done; otherwise why not. Never asks for a password."""
    try:
        done = subprocess.run(
            ["systemctl", "--no-ask-password", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=limit_s,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stdout.decode("utf-8", "replace").strip() or f"systemctl ended with {done.returncode}"


def state_of(name: str) -> str:
    """active, activating, failed, inactive ...; empty if systemd does not say."""
    try:
        done = subprocess.run(
            ["systemctl", "is-active", name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()
