"""The server as a process of its own, around the fake model: real sockets, real signals."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from served import KEY, chat_body, wait_for

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
HEADERS = {"Authorization": f"Bearer {KEY}"}


class Server:
    """`command` starts another server than the one around the fake model."""

    def __init__(self, port: int, log: Path, command: list[str] | None = None, **environment: str) -> None:
        self.port, self.log = port, log
        self.url = f"http://127.0.0.1:{port}"
        settings = {"GLM_API_HOST": "127.0.0.1", "GLM_API_PORT": str(port), "GLM_API_KEY": KEY, **environment}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command or [sys.executable, str(Path(__file__).with_name("fake_server.py"))],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **settings}, stdout=out, stderr=out,
            )  # fmt: skip

    def health(self) -> dict[str, Any]:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).json()
        except httpx.TransportError:
            return {"state": "down"}

    def until(self, condition: Callable[[dict[str, Any]], bool], limit_s: float = WAIT_S) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        while not condition(health := self.health()):
            assert time.monotonic() < deadline, f"{health}\n{self.log.read_text()}"
            time.sleep(0.02)
        return health

    def until_logged(self, text: str) -> str:
        """The log, once it has `text`: a line about a request comes after its answer."""
        wait_for(lambda: text in self.log.read_text())
        return self.log.read_text()

    def post(self, body: dict[str, Any], timeout: float = WAIT_S) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=timeout)

    def open_stream(self, stack: contextlib.ExitStack, content: str) -> httpx.Response:
        body = chat_body(content, stream=True)
        request = httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=WAIT_S)
        return stack.enter_context(request)
