"""A Python environment with Ray over the one of the tests, kept in ~/.cache for the next run.

Torch and the like are not installed again: the environment finds them in that of the tests, behind its own packages.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "requirements-ray.txt"
KEPT = Path.home() / ".cache" / "glm-web-tests"
INSTALL_S = 900.0


def python() -> Path:
    """The environment's interpreter. What was installed from another list is removed."""
    wanted = hashlib.sha256(f"{LIST.read_text()}{sys.version}{sys.prefix}".encode()).hexdigest()[:16]
    folder = KEPT / f"ray-{wanted}"
    interpreter = folder / "bin" / "python"
    if not (folder / "installed").exists():
        for old in KEPT.glob("ray-*"):
            shutil.rmtree(old)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
        own = subprocess.run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True)
        (Path(own.stdout.strip()) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "-r", str(LIST)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (folder / "installed").touch()
    return interpreter
