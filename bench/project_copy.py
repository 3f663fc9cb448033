"""Copies of the project that run beside it: their own ports, settings and logs, and the same Python environment."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.servers import ROOT, StartError
from settings import FIRST_REPLICA_PORT

LEFT_OUT = ("tests/", "docs/", "bench/", ".ci/")


class ProjectCopy:
    """A started copy. `environment` is that of a shell without any setting of the bundle."""

    def __init__(self, folder: Path, api_port: int, key: str) -> None:
        self.folder, self.api_port, self.key = folder, api_port, key
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")} | {"PYTHONDONTWRITEBYTECODE": "1"}

    @property
    def log_dir(self) -> Path:
        return self.folder / "logs"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    def command(self, *words: str) -> list[str]:
        """health_check.py of this copy, with the environment's Python."""
        return [str(self.folder / ".venv" / "bin" / "python"), str(self.folder / "health_check.py"), *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@contextmanager
def started_copy(settings: Mapping[str, str], label: str = "copy", replicas: int = 1) -> Iterator[ProjectCopy]:
    """A copy of the working tree that start.sh has started with these GLM_* settings on free ports. It is stopped and removed
    afterwards. Raises StartError."""
    with tempfile.TemporaryDirectory(prefix=f"glm-{label}-") as temporary:
        folder = Path(temporary) / "project"
        _copy_to(folder)
        api_port, web_port = _free_ports(replicas)
        key = f"sk-{secrets.token_hex(16)}"
        given = {
            "GLM_API_HOST": "127.0.0.1", "GLM_WEB_HOST": "127.0.0.1", "GLM_API_PORT": str(api_port), "GLM_WEB_PORT": str(web_port),
            "GLM_API_KEY": key, "GLM_MODEL": "models/shapes", "GLM_THREADS": "1", "GLM_START_TIMEOUT_S": "240", **settings,
        }  # fmt: skip
        env_file = folder / ".env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in given.items()), encoding="utf-8")
        env_file.chmod(0o600)
        copy = ProjectCopy(folder, api_port, key)
        try:
            done = copy.run("bash", "start.sh", *(["--replicas", str(replicas)] if replicas > 1 else []))
            if done.returncode:
                raise StartError(done.stdout + done.stderr)
            yield copy
        finally:
            copy.run("bash", "stop.sh")


def _copy_to(folder: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(LEFT_OUT) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").unlink(missing_ok=True)
    (folder / ".venv").symlink_to(Path(sys.prefix))


def _free_ports(replicas: int) -> tuple[int, int]:
    """Of the API and of the page. The ports of several replicas are free too, from FIRST_REPLICA_PORT above the API's."""
    while True:
        api, web = _two_free_ports()
        behind = range(api + FIRST_REPLICA_PORT, api + FIRST_REPLICA_PORT + replicas) if replicas > 1 else range(0)
        if web not in behind and all(map(_is_free, behind)):
            return api, web


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def _two_free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
