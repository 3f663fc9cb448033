"""Injects each fault for real and undoes it. Affects only what start.sh started in this folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from monitor.observe import external_engine, processes
from monitor.observe.http_exchange import Reply, exchange
from monitor.observe.question import text_question
from monitor.store.store import discard_fallback
from settings import ROOT, Settings

FAULT_FILE = "api.fault"


@dataclass
class FaultContext:
    """What a fault may use. `long_s`: duration of the long faults. `env` is added to the checker's environment.

    `queue_full_at`: times (CLOCK_MONOTONIC) of rejections for a full queue; `checked_until`: the last call of
    `why_queue_not_full`.
    """

    settings: Settings
    long_s: float = 600.0
    env: dict[str, str] = field(default_factory=dict)
    queue_full_at: list[float] = field(default_factory=list)
    checked_until: float = 0.0

    def pid(self, part: str) -> int:
        record = processes.read_record(self.settings.log_dir, part)
        if record is None or not processes.is_running(record):
            raise RuntimeError(f"{part} is not running; start it with ./start.sh before the drill")
        return record.pid

    def inject(self, fault: str, seconds: float = 0, bound: bool = True) -> None:
        """Makes the API inject a fault into itself. With `bound`, only into this process, not into its successor."""
        request = {"fault": fault, "seconds": seconds, **({"pid": self.pid("api")} if bound else {})}
        path = self.settings.log_dir / FAULT_FILE
        path.with_suffix(".tmp").write_text(json.dumps(request), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)

    def clear_fault(self) -> None:
        (self.settings.log_dir / FAULT_FILE).unlink(missing_ok=True)


@contextmanager
def kill(context: FaultContext, part: str = "api") -> Iterator[None]:
    os.kill(context.pid(part), signal.SIGKILL)
    yield


@contextmanager
def freeze(context: FaultContext) -> Iterator[None]:
    pid = context.pid("api")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def injected(fault: str, bound: bool = True, seconds: Callable[[FaultContext], float] = lambda context: 0.0, with_request: bool = False):
    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        context.inject(fault, seconds(context), bound)
        client = threading.Thread(target=_send_question, args=(context, seconds(context) + 120), daemon=True)
        if with_request:  # some faults are visible only under load
            client.start()
        try:
            yield
        finally:
            context.clear_fault()

    return make


@contextmanager
def break_script(context: FaultContext) -> Iterator[None]:
    """A page that raises, as after a bad edit. No restart repairs a file, so restarts must stop after one."""
    path = ROOT / "web" / "app.py"
    original = path.read_bytes()
    path.write_bytes(b"raise RuntimeError('broken by the drill')\n")
    try:
        yield
    finally:
        path.write_bytes(original)


@contextmanager
def steal_port(context: FaultContext) -> Iterator[None]:
    """The API is killed and another process takes its port."""
    record = processes.read_record(context.settings.log_dir, "api")
    assert record is not None
    os.kill(context.pid("api"), signal.SIGKILL)
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "for _ in range(200):\n"  # the kernel takes a moment to free the port of a large process
        "    try: s.bind(('0.0.0.0', int(sys.argv[1]))); break\n"
        "    except OSError: time.sleep(0.05)\n"
        "s.listen(); print('on', flush=True); time.sleep(9999)\n"
    )
    deadline = time.monotonic() + 10
    while processes.is_running(record) and time.monotonic() < deadline:
        time.sleep(0.05)
    thief = subprocess.Popen([sys.executable, "-c", code, str(record.port)], stdout=subprocess.PIPE)
    assert thief.stdout is not None
    thief.stdout.readline()
    try:
        yield
    finally:
        thief.kill()
        thief.wait()


@contextmanager
def fill_disk(context: FaultContext) -> Iterator[None]:
    """The log folder on a full tmpfs of 3 MiB, with a copy of the checker's state."""
    folder = context.settings.log_dir.parent / ".drill-full-disk"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=True)
    try:
        for name in ("state.db", "api.pid.json", "web.pid.json", "api.heartbeat.json"):
            source = context.settings.log_dir / name
            if source.exists():
                (folder / name).write_bytes(source.read_bytes()[: 2 * 2**20])
        with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        context.env["GLM_LOG_DIR"] = str(folder)
        yield
    finally:
        context.env.pop("GLM_LOG_DIR", None)
        discard_fallback(folder)
        subprocess.run(["umount", str(folder)], check=False)
        folder.rmdir()


def fake_nvidia_smi(script: str):
    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        folder = context.settings.log_dir / "drill-bin"
        folder.mkdir(exist_ok=True)
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        context.env["PATH"] = f"{folder}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        try:
            yield
        finally:
            context.env.pop("PATH", None)
            tool.unlink()
            folder.rmdir()

    return make


@contextmanager
def no_fault(context: FaultContext) -> Iterator[None]:
    yield


@contextmanager
def jump_clock(context: FaultContext) -> Iterator[None]:
    """The API is killed while the wall clock of the checker jumps ahead by an hour."""
    context.env["DRILL_CLOCK_S"] = "3600"
    try:
        with kill(context):
            yield
    finally:
        context.env.pop("DRILL_CLOCK_S", None)


@contextmanager
def saturate(context: FaultContext) -> Iterator[None]:
    """Constantly more questions than slots and queue can hold."""
    stop = threading.Event()
    metrics = external_engine.parse_metrics(exchange(f"{context.settings.api_base_url}/metrics", 5.0, headers=_key(context)).body.decode())
    width = context.settings.queue_size + int(metrics["glm_num_slots"]) + 16

    def send_questions() -> None:
        while not stop.is_set():
            reply = _send_question(context, 120, tokens=256)
            if reply.status != 200:
                error = (reply.json() or {}).get("error")
                if isinstance(error, dict) and error.get("code") == "queue_full":
                    context.queue_full_at.append(time.monotonic())
                stop.wait(0.2)

    context.queue_full_at, context.checked_until = [], time.monotonic()
    clients = [threading.Thread(target=send_questions, daemon=True) for _ in range(width)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join(5)


def why_queue_not_full(context: FaultContext) -> str:
    """Empty if a question was rejected for a full queue since the last call; otherwise why the fault does not count."""
    since, context.checked_until = context.checked_until, time.monotonic()
    if any(at >= since for at in context.queue_full_at):
        return ""
    return f"no question was rejected for {context.checked_until - since:.0f} s, so the queue was not full"


def queue_full_summary(context: FaultContext) -> str:
    gaps = [after - before for before, after in itertools.pairwise(context.queue_full_at)]
    return f"{len(context.queue_full_at)} questions rejected, at most {max(gaps, default=0):.0f} s between two"


@contextmanager
def full_gpu_load(context: FaultContext) -> Iterator[None]:
    """A fake nvidia-smi reports 100 % load on every card."""
    line = "0, GPU-1, 100, 24576, 24000, 576, 550.1, Stand-in, 1, Disabled, Disabled, 83"
    with fake_nvidia_smi(f"echo '{line}'")(context):
        yield


@contextmanager
def exceed_memory_limit(context: FaultContext) -> Iterator[None]:
    """Moves the limit below the memory in use, rather than filling the machine."""
    context.env["GLM_MEMORY_LIMIT_PERCENT"] = "1"
    context.env["GLM_LIMIT_WINDOW_S"] = "0"
    try:
        yield
    finally:
        context.env.pop("GLM_MEMORY_LIMIT_PERCENT", None)
        context.env.pop("GLM_LIMIT_WINDOW_S", None)


@contextmanager
def block_alert_channel(context: FaultContext) -> Iterator[None]:
    """The alert channel accepts connections but never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context.env["GLM_WEBHOOK_URL"] = f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        with exceed_memory_limit(context):  # so that there is something to report
            yield
    context.env.pop("GLM_WEBHOOK_URL", None)


def _send_question(context: FaultContext, limit_s: float, tokens: int = 8) -> Reply:
    body = {**text_question(random.Random()).body, "max_tokens": tokens, "stream": False}
    headers = {"Content-Type": "application/json", **_key(context)}
    url = f"{context.settings.api_base_url}/v1/chat/completions"
    return exchange(url, limit_s, "POST", json.dumps(body).encode(), headers, connect_s=5.0)


def _key(context: FaultContext) -> dict[str, str]:
    key = context.settings.api_key
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


@contextmanager
def start_slowly(context: FaultContext) -> Iterator[None]:
    """The API is killed and its successor loads slowly."""
    context.inject("slow-start", min(40.0, context.long_s), bound=False)
    os.kill(context.pid("api"), signal.SIGKILL)
    try:
        yield
    finally:
        context.clear_fault()


@contextmanager
def crash_on_start(context: FaultContext) -> Iterator[None]:
    pid = context.pid("api")
    context.inject("crash-start", bound=False)
    os.kill(pid, signal.SIGKILL)
    try:
        yield
    finally:
        context.clear_fault()
