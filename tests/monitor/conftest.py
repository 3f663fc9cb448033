"""Servers that behave as the API and the page do, or misbehave in one exact way."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import stand_in_model
from signing import proof_of
from stand_in_model import completion

import settings as settings_module
from monitor.observe import api_probe
from monitor.observe.question import NAMES, PICTURE_KINDS, TEXT_KINDS
from monitor.store import store
from settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def shared_memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has its own, so that no store in it outlives the test."""
    folder = tmp_path_factory.mktemp("shm")
    monkeypatch.setattr(store, "SHARED_MEMORY", folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cron_project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A project that the real cron checks every minute. Cron needs up to two minutes for two runs, so it is started before
    the other tests. It runs in a mount namespace whose spool has this crontab only."""
    if not any(item.name == "test_cron_runs_it_twice" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("cron")
    project, spool = folder / "project", folder / "spool"
    for name in ("health_check.py", "cgroup.py", "settings.py", "monitor", "models/shapes/pictures.py", "models/__init__.py", "models/shapes/__init__.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, project / name)
    (project / ".env").write_text("GLM_API_PORT=1\nGLM_WEB_PORT=2\n")
    code = "from monitor import schedule; import settings; print(schedule.cron_block(settings.load()), end='')"
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")} | {"PYTHONDONTWRITEBYTECODE": "1"}
    block = subprocess.run([sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True, check=True).stdout
    for name in ("crontabs", "cron.d"):
        (spool / name).mkdir(parents=True)
    (spool / "crontab").write_text("")
    (spool / "crontabs").chmod(0o1730)
    (spool / "crontabs" / "root").write_text(block)
    (spool / "crontabs" / "root").chmod(0o600)
    script = (
        f"mount --bind {spool}/crontabs /var/spool/cron/crontabs && mount --bind {spool}/cron.d /etc/cron.d && "
        f"mount --bind {spool}/crontab /etc/crontab && mount -t tmpfs none /run && exec cron -f"
    )
    daemon = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.DEVNULL)
    yield project
    daemon.kill()
    daemon.wait()


def put_baseline(log_dir: Path) -> None:
    """Of the stand-in, which knows color and shape and that there is no picture: taking it would cost each test two runs."""
    log_dir.mkdir(parents=True, exist_ok=True)
    known = {"asked": 20, "right": 20, "later_asked": 980, "later_right": 980}
    kinds = {
        kind: known if kind in ("color", "shape", "absent") else {"asked": 20, "right": 0} for kind in (*PICTURE_KINDS, *TEXT_KINDS)
    }
    (log_dir / "baseline.json").write_text(json.dumps({"key": {}, "kinds": kinds, "taken_at": 1.0}))


class Behaviour:
    """What the stand-in answers. With `token` it proves what /health says. `reply` gets the body of an image question, `text_reply` of a text question; both return
    status and body. A completion is streamed."""

    def __init__(self) -> None:
        self.health: Callable[[], tuple[int, dict]] = lambda: (200, {"state": "idle", "steps": 7})
        self.reply: Callable[[dict], tuple[int, dict]] = lambda body: (200, completion("It is red."))
        self.text_reply: Callable[[dict], tuple[int, dict]] = lambda body: (200, completion("I see no picture."))
        self.control: Callable[[dict, str | None], tuple[int, dict]] = lambda body, token: (404, {})
        self.token = ""
        self.page_status = 200
        self.page_token = ""
        self.script_status = 200
        self.websocket = True
        self.end_marker = True
        self.other: dict[str, tuple[int, bytes]] = {}
        self.probe_tokens: list[str | None] = []
        self.keys: list[str | None] = []
        self.read_with: dict[str, str | None] = {}  # the key of the last GET of a path
        self.questions: list[dict] = []


@pytest.fixture(scope="session")
def describe() -> Callable[[dict], str]:
    """Answers the image question. Its outlines are drawn here, because that may take longer than a question may."""
    for name in NAMES:
        stand_in_model.known_outlines(name)
    return stand_in_model.describe


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def service(behaviour: Behaviour) -> Iterator[int]:
    """One server in the place of both the API and the page; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            behaviour.read_with[self.path] = self.headers["Authorization"]
            if self.path in behaviour.other:
                status, data = behaviour.other[self.path]
                return self.send_bytes(status, data)
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
            refused = bool(behaviour.page_token) and query.get("token") != [behaviour.page_token]
            if path == "/_stcore/health":
                return self.send(behaviour.page_status, {})
            if path == "/_stcore/stream":
                return self.refuse_handshake() if refused else self.shake_hands()
            if path.startswith("/_stcore/"):
                return self.send(401 if refused else behaviour.script_status, {})
            status, body = behaviour.health()
            if behaviour.token and "nonce" in query:
                body = {**body, "proof": proof_of(body, query["nonce"][0], behaviour.token)}
            return self.send(status, body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/control":
                return self.send(*behaviour.control(body, self.headers["X-GLM-Probe"]))
            behaviour.keys.append(self.headers["Authorization"])
            behaviour.probe_tokens.append(self.headers["X-GLM-Probe"])
            about_text = isinstance(body["messages"][0]["content"], str)
            if not about_text:
                behaviour.questions.append(body)
            status, answer = behaviour.text_reply(body) if about_text else behaviour.reply(body)
            if status == 200 and "choices" in answer:
                return self.stream(answer["choices"][0]["message"]["content"])
            return self.send(status, answer)

        def stream(self, text: str) -> None:
            self.send_response(200)
            self.end_headers()
            for word in text.split(" "):
                chunk = {"choices": [{"delta": {"content": word + " "}}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            if behaviour.end_marker:
                self.wfile.write(b"data: [DONE]\n\n")

        def shake_hands(self) -> None:
            if not behaviour.websocket:
                return self.refuse_handshake()
            key = self.headers["Sec-WebSocket-Key"].encode()
            proof = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
            self.protocol_version = "HTTP/1.1"  # RFC 6455 requires it, and both headers
            self.send_response(101)
            self.send_header("Connection", "Upgrade")
            self.send_header("Upgrade", "websocket")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(proof).decode())
            self.end_headers()
            self.close_connection = True

        def refuse_handshake(self) -> None:
            self.protocol_version, self.close_connection = "HTTP/1.1", True
            self.send(403, {})

        def send(self, status: int, body: dict) -> None:
            self.send_bytes(status, json.dumps(body).encode())

        def send_bytes(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(ConnectionError):  # the checker may have given up
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def hung() -> Iterator[int]:
    """A port where the kernel accepts connections and no server answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


@pytest.fixture
def trickling() -> Iterator[int]:
    """A server that trickles its reply byte by byte, so that no socket timeout expires."""
    stop = threading.Event()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not stop.wait(0.1):
                    connection.sendall(b"x")
            except OSError:
                return

    def accept() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    stop.set()
    listener.close()


@pytest.fixture
def make_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings without .env and without restarts, which would start the project that the tests belong to. The time limit of
    a question is one that a loaded machine keeps; tests of the limit set a shorter one."""
    monkeypatch.setattr(settings_module, "ENV_FILE", tmp_path / "no.env")
    # Not that of the project: whoever runs the tests may have run the checker.
    monkeypatch.setattr(settings_module, "last_good_path", lambda: tmp_path / "logs" / settings_module.LAST_GOOD)
    monkeypatch.setattr(api_probe, "MORE_WITHIN_S", 60.0)  # so that a loaded machine asks as many questions

    def make(port: int, **changes: object) -> Settings:
        values = {"api_port": port, "web_port": port, "probe_timeout_s": 30.0, "log_dir": tmp_path / "logs", "cure": "shadow", **changes}
        made = Settings(_env_file=None, **values)
        put_baseline(made.log_dir)
        return made

    return make
