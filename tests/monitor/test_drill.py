"""A few faults of the drill on the real service; the whole drill takes half an hour and is in docs/operations.md."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRILLED = ("api-killed", "engine-dead")


def test_a_short_drill_of_the_real_service_passes(tmp_path, monkeypatch):
    """start.sh, the demo model, real faults, real runs of the checker: found, cured, and left alone where it must be."""
    root = tmp_path / "project"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "docs/", "bench/")) and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")} | {
        "GLM_API_HOST": "127.0.0.1", "GLM_WEB_HOST": "127.0.0.1", "GLM_API_PORT": str(ports[0]), "GLM_WEB_PORT": str(ports[1]),
        "GLM_MODEL": "models/shapes", "GLM_THREADS": "1", "GLM_TEST_FAULTS": "true", "CONDA_PREFIX": sys.prefix,
        "CONDA_DEFAULT_ENV": "tests", "GLM_START_TIMEOUT_S": "240",
    }  # fmt: skip
    started = subprocess.run(["bash", "start.sh"], cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        done = subprocess.run(
            [sys.executable, "health_check.py", "drill", "--yes", "--period", "3", *DRILLED], cwd=root, env=env,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        for name in DRILLED:
            assert f"pass  {name}" in done.stdout
        trace = json.loads((root / "logs" / "drill" / "engine-dead.json").read_text())
        assert [step["word"] for step in trace["runs"]][:2] == ["dead", "healthy"] and trace["restarts"] == 1
    finally:
        subprocess.run(["bash", "stop.sh"], cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True)
