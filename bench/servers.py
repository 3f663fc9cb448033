"""Servers to measure: processes that are started one at a time, or a running server by its URL."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.client import Address

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT_S = 300.0
STOP_LIMIT_S = 10.0
PROBE_TOKEN = "bench-probe"
PAGE_TOKEN = "bench-page"


class StartError(RuntimeError):
    """A server did not start; the message includes the end of its log."""


class Server:
    """A running server. `process` is None if it was not started here."""

    def __init__(self, address: Address, process: subprocess.Popen[bytes] | None = None) -> None:
        self.address, self.process = address, process

    def peak_bytes(self) -> int | None:
        """Peak resident memory of the process (VmHWM)."""
        return self._status("VmHWM")

    def resident_bytes(self) -> int | None:
        return self._status("VmRSS")

    def cpu_s(self) -> float:
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def _status(self, name: str) -> int | None:
        if self.process is None:
            return None
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return None


@contextmanager
def naive(folder: Path, dtype: str, device: str) -> Iterator[Server]:
    """(a): the FastAPI handler of bench/naive.py."""
    port = _free_port()
    command = ["-m", "bench.naive", "--model", str(folder), "--port", str(port), "--dtype", dtype, "--device", device]
    with _started(command, {}, Address(f"http://127.0.0.1:{port}")) as server:
        yield server


@contextmanager
def this(folder: Path, dtype: str, device: str, root: Path = ROOT, port: int = 0, **settings: str) -> Iterator[Server]:
    """(b): this project's server, or that of another checkout at `root`; `settings` are GLM_* values. Port 0: a free one."""
    port, key = port or _free_port(), f"sk-{secrets.token_hex(16)}"
    with tempfile.TemporaryDirectory(prefix="glm-bench-") as logs:
        environment = {
            "GLM_API_HOST": "127.0.0.1", "GLM_API_PORT": str(port), "GLM_API_KEY": key, "GLM_MODEL": str(folder),
            "GLM_DTYPE": dtype, "GLM_DEVICE": device, "GLM_LOG_DIR": logs, **settings,
        }  # fmt: skip
        address = Address(f"http://127.0.0.1:{port}", key=key)
        with _started(["-m", "api.server"], environment, address, root=root) as server:
            yield server


@contextmanager
def page(api_url: str) -> Iterator[Server]:
    """The web page in front of an API; its access token is PAGE_TOKEN."""
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="glm-bench-") as logs:
        environment = {"GLM_API_URL": api_url, "GLM_API_KEY": "none", "GLM_WEB_TOKEN": PAGE_TOKEN, "GLM_LOG_DIR": logs}
        command = ["-m", "web.server", "--host", "127.0.0.1", "--port", str(port)]
        with _started(command, environment, Address(f"http://127.0.0.1:{port}"), _wait_for_page) as server:
            yield server


@contextmanager
def running(url: str, key: str, model: str | None) -> Iterator[Server]:
    """(c): any other server that speaks the OpenAI protocol."""
    server = Server(Address(url.rstrip("/").removesuffix("/v1"), model, key))
    asyncio.run(_wait(server, START_LIMIT_S))
    yield server


@contextmanager
def _started(
    command: list[str],
    environment: dict[str, str],
    address: Address,
    wait: Callable[[Server, float], Coroutine[Any, Any, None]] | None = None,
    root: Path = ROOT,
) -> Iterator[Server]:
    # Let `finally` run after SIGTERM: no server may be left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GLM_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=root, env={**clean, **environment}, stdout=log, stderr=log
        )
        server = Server(address, process)
        try:
            asyncio.run((wait or _wait)(server, START_LIMIT_S))
            yield server
        except StartError as error:
            log.seek(0)
            tail = log.read()[-2000:].decode(errors="replace")
            raise StartError(f"{error}\n{tail}") from None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _wait(server: Server, limit_s: float) -> None:
    """Until it answers a request: an open port does not mean that it is ready."""
    until = time.monotonic() + limit_s
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "stream": True}
    if server.address.model:
        body["model"] = server.address.model
    last = ""
    async with server.address.client() as client:
        while time.monotonic() < until:
            if server.process and server.process.poll() is not None:
                raise StartError(f"the server exited with code {server.process.returncode}")
            try:
                response = await client.post("/v1/chat/completions", json=body)
                if response.status_code == 200:
                    return
                last = f"{response.status_code} {response.text[:200]}"
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            await asyncio.sleep(0.25)
    raise StartError(f"{server.address.url} did not answer within {limit_s:g} s: {last}")


async def _wait_for_page(server: Server, limit_s: float) -> None:
    until = time.monotonic() + limit_s
    async with server.address.client() as client:
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                if (await client.get("/_stcore/health")).status_code == 200:
                    return
            await asyncio.sleep(0.25)
    raise StartError(f"{server.address.url} did not start within {limit_s:g} s")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
