"""Faults at the port of the API: another process has it, silent or with a copied answer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monitor.drill.context import FaultContext
from monitor.drill.faults.processes import Inject, killed_and_gone
from monitor.observe.http_exchange import exchange

STAND_IN = Path(__file__).resolve().parents[1] / "stand_in.py"
ON_LIMIT_S = 15.0


class StandIn:
    """A running stand_in.py. It ends with this process, however that ends, because its standard input does."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}"

    def becomes(self, mode: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{mode}\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("the stand-in has ended")


@contextmanager
def stand_in(mode: str, port: int = 0, upstream: str = "") -> Iterator[StandIn]:
    """Port 0 takes a free one. It runs outside of the project's folder and without its settings, as a stranger does."""
    env = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
    process = subprocess.Popen(
        [sys.executable, "-I", str(STAND_IN), str(port), mode, upstream], cwd="/", env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        if said[:1] != ["on"]:
            raise RuntimeError(f"the stand-in could not listen on port {port}")
        yield StandIn(process, int(said[1]))
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):
                pipe.close()


@contextmanager
def steal(context: FaultContext) -> Iterator[None]:
    """The API is killed and another process takes its port, which accepts connections and says nothing."""
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "for _ in range(200):\n"  # the kernel takes a moment to free the port of a large process
        "    try: s.bind(('0.0.0.0', int(sys.argv[1]))); break\n"
        "    except OSError: time.sleep(0.05)\n"
        "s.listen(); print('on', flush=True); time.sleep(9999)\n"
    )
    with killed_and_gone(context) as record:
        thief = subprocess.Popen([sys.executable, "-c", code, str(record.port)], stdout=subprocess.PIPE)
        assert thief.stdout is not None
        thief.stdout.readline()
        try:
            yield
        finally:
            thief.kill()
            thief.wait()


@contextmanager
def replay(context: FaultContext) -> Iterator[None]:
    """The API is killed, and a stranger at its port answers its last /health, with ever fresh ages of success."""
    reply = exchange(f"{context.settings.api_base_url}/health?nonce={os.urandom(16).hex()}", 5.0)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as copied:
        json.dump(reply.json() or {}, copied)
        copied.flush()
        with killed_and_gone(context) as record, stand_in(f"replay {copied.name}", record.port):
            yield


@contextmanager
def engine_behind(context: FaultContext) -> Iterator[None]:
    """The checker watches an external engine, which is this API behind a stand-in that passes everything on."""
    with stand_in("right", upstream=context.settings.api_base_url) as engine:
        context.engine = engine
        context.env |= {"GLM_ENGINE_URL": engine.url, "GLM_API_URL": engine.url}
        try:
            yield
        finally:
            for name in ("GLM_ENGINE_URL", "GLM_API_URL"):
                context.env.pop(name, None)
            context.engine = None


def engine_becomes(mode: str) -> Inject:
    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        if context.engine is None:
            raise RuntimeError("there is no external engine")
        context.engine.becomes(mode)
        yield

    return make


@contextmanager
def block_alert_channel(context: FaultContext) -> Iterator[None]:
    """The alert channel accepts connections but never answers. The limit of memory is exceeded, so that there is an alert."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context.env["GLM_WEBHOOK_URL"] = f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        context.env |= MEMORY_EXCEEDED
        try:
            yield
        finally:
            for name in ("GLM_WEBHOOK_URL", *MEMORY_EXCEEDED):
                context.env.pop(name, None)


# Moves the limit below the memory in use, rather than filling the machine.
MEMORY_EXCEEDED = {"GLM_MEMORY_LIMIT_PERCENT": "1", "GLM_LIMIT_WINDOW_S": "0"}
