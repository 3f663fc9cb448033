"""Starts a real page or API process with its own settings and waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import requests
from playwright.sync_api import Page
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
OpenPage = Callable[..., Page]
START_S = 120.0  # a loaded machine imports slowly


def wait_until(condition: Callable[[], object], what: str, within_s: float = START_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {within_s:.0f} s waiting for {what}"
        time.sleep(0.03)


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without its GLM_ settings, plus the given ones.

    A server process still reads .env, so a test must set every setting that it relies on.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GLM_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **settings}


class Server:
    """A server process of the project on a free port; use as a context manager."""

    def __init__(self, module: str, health_path: str, log_path: Path, **settings: str) -> None:
        self.log_path = log_path
        self._module = module
        self._health_path = health_path
        self._environment = clean_environment(**settings)
        self.process: subprocess.Popen[bytes] | None = None
        self.use_port(free_port())

    def use_port(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._start()
        try:
            wait_until(self._answers, self.url + self._health_path)
        except AssertionError as error:
            self.__exit__()
            raise AssertionError(f"{self._module}: {error}. Its log:\n{self.log_text()[-4000:]}") from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def run_until_exit(self) -> int:
        return self._start().wait(START_S)

    def log_text(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self._module, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self.process

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"it ended with {self.process.returncode}"
        try:
            return requests.get(self.url + self._health_path, timeout=2).status_code == 200
        except requests.RequestException:
            return False
