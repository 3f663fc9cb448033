"""The faults of the drill: how each is made for real, how it is taken back, and what the checker must come to.

Kept apart from the drill that times them. Works on what start.sh started in this folder, and only on that.
"""

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

from monitor.observe import external_engine as foreign
from monitor.observe import processes
from monitor.observe.exchange import Reply, exchange
from monitor.observe.question import about_text
from monitor.store import store
from settings import ROOT, Settings

API_ORDER = "api.fault"


@dataclass
class Bench:
    """What a fault may use. `long_s` is the length of the long ones, `env` is added to the checker's environment.

    `turned_away`: when a question was refused because the queue was full (CLOCK_MONOTONIC); `asked_until`: up to when
    `queue_was_full` has looked at them.
    """

    settings: Settings
    long_s: float = 600.0
    env: dict[str, str] = field(default_factory=dict)
    turned_away: list[float] = field(default_factory=list)
    asked_until: float = 0.0

    def pid(self, part: str) -> int:
        record = processes.read_record(self.settings.log_dir, part)
        if record is None or not processes.is_running(record):
            raise RuntimeError(f"{part} does not run; start it with ./start.sh before the drill")
        return record.pid

    def order(self, fault: str, seconds: float = 0, bound: bool = True) -> None:
        """Tell the API to break itself. Bound to its pid, the process started in its place is sound."""
        order = {"fault": fault, "seconds": seconds, **({"pid": self.pid("api")} if bound else {})}
        path = self.settings.log_dir / API_ORDER
        path.with_suffix(".tmp").write_text(json.dumps(order), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)

    def take_order_back(self) -> None:
        (self.settings.log_dir / API_ORDER).unlink(missing_ok=True)


@contextmanager
def kill(bench: Bench, part: str = "api") -> Iterator[None]:
    os.kill(bench.pid(part), signal.SIGKILL)
    yield


@contextmanager
def freeze(bench: Bench) -> Iterator[None]:
    pid = bench.pid("api")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def ordered(fault: str, bound: bool = True, seconds: Callable[[Bench], float] = lambda bench: 0.0, asks: bool = False):
    @contextmanager
    def make(bench: Bench) -> Iterator[None]:
        bench.order(fault, seconds(bench), bound)
        asker = threading.Thread(target=_ask_once, args=(bench, seconds(bench) + 120), daemon=True)
        if asks:  # some faults strike only when there is work
            asker.start()
        try:
            yield
        finally:
            bench.take_order_back()

    return make


@contextmanager
def break_script(bench: Bench) -> Iterator[None]:
    """A page that raises, as after a bad edit. No restart mends a file, so it must be told and not retried for ever."""
    path = ROOT / "web" / "app.py"
    sound = path.read_bytes()
    path.write_bytes(b"raise RuntimeError('broken by the drill')\n")
    try:
        yield
    finally:
        path.write_bytes(sound)


@contextmanager
def steal_port(bench: Bench) -> Iterator[None]:
    """The API is gone and a stranger sits on its port."""
    record = processes.read_record(bench.settings.log_dir, "api")
    assert record is not None
    os.kill(bench.pid("api"), signal.SIGKILL)
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "for _ in range(200):\n"  # the kernel takes a moment to take the port from a large process
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
def fill_disk(bench: Bench) -> Iterator[None]:
    """The log folder on a tmpfs of 3 MiB without a free byte, with what the checker knows copied into it."""
    folder = bench.settings.log_dir.parent / ".drill-full-disk"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=True)
    try:
        for name in ("state.db", "api.pid.json", "web.pid.json", "api.heartbeat.json"):
            source = bench.settings.log_dir / name
            if source.exists():
                (folder / name).write_bytes(source.read_bytes()[: 2 * 2**20])
        with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        bench.env["GLM_LOG_DIR"] = str(folder)
        yield
    finally:
        bench.env.pop("GLM_LOG_DIR", None)
        store.discard_kept(folder)
        subprocess.run(["umount", str(folder)], check=False)
        folder.rmdir()


def stand_in_tool(script: str):
    @contextmanager
    def make(bench: Bench) -> Iterator[None]:
        folder = bench.settings.log_dir / "drill-bin"
        folder.mkdir(exist_ok=True)
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        bench.env["PATH"] = f"{folder}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        try:
            yield
        finally:
            bench.env.pop("PATH", None)
            tool.unlink()
            folder.rmdir()

    return make


@contextmanager
def nothing(bench: Bench) -> Iterator[None]:
    yield


@contextmanager
def jump_clock(bench: Bench) -> Iterator[None]:
    """The API is killed, and the next run sees a wall clock that is an hour ahead of the run before."""
    bench.env["DRILL_CLOCK_S"] = "3600"
    try:
        with kill(bench):
            yield
    finally:
        bench.env.pop("DRILL_CLOCK_S", None)


@contextmanager
def saturate(bench: Bench) -> Iterator[None]:
    """More questions than slots and queue hold, all the time."""
    stop = threading.Event()
    metrics = foreign.parse(exchange(f"{bench.settings.api_base_url}/metrics", 5.0, headers=_key(bench)).body.decode())
    width = bench.settings.queue_size + int(metrics["glm_num_slots"]) + 16

    def ask_on() -> None:
        while not stop.is_set():
            reply = _ask_once(bench, 120, tokens=256)
            if reply.status != 200:
                error = (reply.json() or {}).get("error")
                if isinstance(error, dict) and error.get("code") == "queue_full":
                    bench.turned_away.append(time.monotonic())
                stop.wait(0.2)

    bench.turned_away, bench.asked_until = [], time.monotonic()
    askers = [threading.Thread(target=ask_on, daemon=True) for _ in range(width)]
    for asker in askers:
        asker.start()
    try:
        yield
    finally:
        stop.set()
        for asker in askers:
            asker.join(5)


def queue_was_full(bench: Bench) -> str:
    """Empty if somebody was turned away since the last time this was asked: otherwise the queue had room."""
    since, bench.asked_until = bench.asked_until, time.monotonic()
    if any(at >= since for at in bench.turned_away):
        return ""
    return f"for {bench.asked_until - since:.0f} s nobody was turned away, so the queue was not full"


def how_full(bench: Bench) -> str:
    gaps = [after - before for before, after in itertools.pairwise(bench.turned_away)]
    return f"{len(bench.turned_away)} questions turned away, at most {max(gaps, default=0):.0f} s between two"


@contextmanager
def burn(bench: Bench) -> Iterator[None]:
    """Every card reads 100 %: a stand-in tool, because load alone says nothing about health."""
    line = "0, GPU-1, 100, 24576, 24000, 576, 550.1, Stand-in, 1, Disabled, Disabled, 83"
    with stand_in_tool(f"echo '{line}'")(bench):
        yield


@contextmanager
def fill_memory(bench: Bench) -> Iterator[None]:
    """Memory at its limit, as a reading: the limit is moved below what is used rather than the machine filled."""
    bench.env["GLM_MEMORY_LIMIT_PERCENT"] = "1"
    bench.env["GLM_LIMIT_WINDOW_S"] = "0"
    try:
        yield
    finally:
        bench.env.pop("GLM_MEMORY_LIMIT_PERCENT", None)
        bench.env.pop("GLM_LIMIT_WINDOW_S", None)


@contextmanager
def cut_channel(bench: Bench) -> Iterator[None]:
    """The alert channel's address takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bench.env["GLM_WEBHOOK_URL"] = f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        with fill_memory(bench):  # so that there is something to tell
            yield
    bench.env.pop("GLM_WEBHOOK_URL", None)


def _ask_once(bench: Bench, limit_s: float, tokens: int = 8) -> Reply:
    body = {**about_text(random.Random()).body, "max_tokens": tokens, "stream": False}
    headers = {"Content-Type": "application/json", **_key(bench)}
    url = f"{bench.settings.api_base_url}/v1/chat/completions"
    return exchange(url, limit_s, "POST", json.dumps(body).encode(), headers, connect_s=5.0)


def _key(bench: Bench) -> dict[str, str]:
    key = bench.settings.api_key
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


@contextmanager
def start_slowly(bench: Bench) -> Iterator[None]:
    """Killed, and what is started in its place loads for a while: starting is not dead."""
    bench.order("slow-start", min(40.0, bench.long_s), bound=False)
    os.kill(bench.pid("api"), signal.SIGKILL)
    try:
        yield
    finally:
        bench.take_order_back()


@contextmanager
def crash_on_start(bench: Bench) -> Iterator[None]:
    pid = bench.pid("api")
    bench.order("crash-start", bound=False)
    os.kill(pid, signal.SIGKILL)
    try:
        yield
    finally:
        bench.take_order_back()
