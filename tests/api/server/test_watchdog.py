"""What the real server tells a service manager, by a stand-in for the manager's socket."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ports import free_port
from served import chat_body, wait_for
from server_process import WAIT_S, Server

from api.health.watchdog import Watchdog


class Manager:
    """The socket of a service manager, and the time at which each of its lines came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            words = self._socket.recv(4096).decode().split("\n")
            self.lines += [(time.monotonic(), word) for word in words]

    def times(self, word: str, since: float = 0.0) -> list[float]:
        return [at for at, line in tuple(self.lines) if line.startswith(word) and at >= since]


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory() as folder:  # a short path: a socket's has at most 107 bytes
        yield Manager(Path(folder) / "notify")


@pytest.fixture(scope="module")
def server(manager: Manager, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, whose load takes three seconds longer and moves meanwhile."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "api.fault").write_text(json.dumps({"fault": "slow-start", "seconds": 3}))
    started = Server(
        free_port(), folder / "api.log", [sys.executable, "-m", "api.server"], GLM_LOG_DIR=str(folder), GLM_MODEL="models/shapes",
        GLM_TEST_FAULTS="true", NOTIFY_SOCKET=str(manager.path), OMP_NUM_THREADS="1",
    )  # fmt: skip
    yield started
    started.process.kill()
    started.process.wait(WAIT_S)


def inject(server: Server, fault: str, seconds: float = 0) -> None:
    (server.log.parent / "api.fault").write_text(json.dumps({"fault": fault, "seconds": seconds}))


def test_it_is_ready_only_when_it_can_answer(server: Server, manager: Manager) -> None:
    server.until(lambda health: health["state"] == "loading")
    wait_for(lambda: len(manager.times("EXTEND_TIMEOUT_USEC=300000000")) >= 2, WAIT_S)
    assert not manager.times("READY=1"), "it says that it is ready while it loads"
    assert server.post(chat_body("hello")).status_code == 503
    inject(server, "none")

    wait_for(lambda: bool(manager.times("READY=1")), WAIT_S)

    assert server.post(chat_body("What can you do?", max_tokens=8)).status_code == 200
    assert len(manager.times("READY=1")) == 1
    assert not manager.times("EXTEND_TIMEOUT_USEC", manager.times("READY=1")[0] + 0.01)
    wait_for(lambda: bool(manager.times("WATCHDOG_USEC=120000000")), WAIT_S)  # the limit in force, whatever the unit says
    assert manager.times("STATUS=loading the model")
    wait_for(lambda: bool(manager.times("STATUS=idle")), WAIT_S)


def test_it_goes_on_telling_while_idle_and_under_load(server: Server, manager: Manager) -> None:
    began = time.monotonic()
    wait_for(lambda: len(manager.times("WATCHDOG=1", began)) >= 3, WAIT_S)

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.post, chat_body("What can you do?", max_tokens=64)) for _ in range(200)]
        wait_for(lambda: len(manager.times("WATCHDOG=1", began)) >= 3, WAIT_S)
        busy = not all(each.done() for each in asked)
        for each in asked:
            each.cancel()

    assert busy, "the load ended before the third word of progress: nothing was shown"


def test_it_is_silent_while_the_event_loop_stands_still(server: Server, manager: Manager) -> None:
    inject(server, "block-loop", 6)
    wait_for(lambda: not (server.log.parent / "api.fault").exists(), WAIT_S)
    blocked = time.monotonic()
    time.sleep(4)

    assert not manager.times("WATCHDOG=1", blocked + 1.5)
    wait_for(lambda: bool(manager.times("WATCHDOG=1", blocked + 5)), WAIT_S)


def test_a_hung_engine_is_silent_though_http_answers(server: Server, manager: Manager) -> None:
    inject(server, "hang-step")
    threading.Thread(target=_ask_in_vain, args=(server,), daemon=True).start()
    server.until(lambda health: health["running"] + health["waiting"] > 0 and health["no_progress_s"] > 2)
    hung = time.monotonic()
    time.sleep(5)

    assert not manager.times("WATCHDOG=1", hung)
    assert not manager.times("WATCHDOG_USEC", hung), "this would restart the manager's clock"
    assert server.health()["state"] == "busy", "HTTP answers, and the deadline of a hang is not over"


def _ask_in_vain(server: Server) -> None:
    with contextlib.suppress(httpx.HTTPError):
        server.post(chat_body("hello"))


def test_a_stop_is_told(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manager = Manager(Path(folder) / "notify")
        server = Server(free_port(), tmp_path / "api.log", NOTIFY_SOCKET=str(manager.path), FAKE_TOKEN_S="0.3", GLM_LOG_DIR=str(tmp_path))
        wait_for(lambda: bool(manager.times("READY=1")), WAIT_S)
        threading.Thread(target=server.post, args=(chat_body("one two three four five six seven eight"),), daemon=True).start()
        server.until(lambda health: health["running"] == 1)
        server.process.send_signal(signal.SIGTERM)

        wait_for(lambda: bool(manager.times("STOPPING=1")), WAIT_S)
        assert server.process.wait(WAIT_S) == 0


def test_a_delayed_stop_is_told_once_and_goes_on_moving(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manager = Manager(Path(folder) / "notify")
        environment = {"NOTIFY_SOCKET": str(manager.path), "GLM_LOG_DIR": str(tmp_path), "GLM_DRAIN_DELAY_S": "5"}
        server = Server(free_port(), tmp_path / "api.log", **environment)
        wait_for(lambda: bool(manager.times("READY=1")), WAIT_S)
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()

        assert server.process.wait(WAIT_S) == 0
        stopping = manager.times("STOPPING=1")
        assert len(stopping) == 1 and stopping[0] < signalled + 3
        assert len(manager.times("WATCHDOG=1", stopping[0])) >= 2, "the manager would take the delay for a hang"


def test_without_a_manager_nothing_is_sent_and_children_do_not_inherit_it() -> None:
    environment = {"NOTIFY_SOCKET": "/nowhere/notify", "HOME": "/"}
    watchdog = Watchdog.from_environment(1, 1, environment)

    assert environment == {"HOME": "/"}
    assert watchdog._address == "/nowhere/notify" and Watchdog("@name", 1, 1)._address == "\0name"
    watchdog._send("READY=1")  # nobody listens: it must not raise
