"""The nginx in front of replicas: a configuration that nginx takes, and that keeps a conversation at one replica."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from ports import free_port

from deploy.proxy import ProxyError, render_front
from deploy.replicas import nginx
from settings import FIRST_REPLICA_PORT, Settings


class StandIn(ThreadingHTTPServer):
    """Answers with its number, or as `answer` says; notes what it was asked."""

    def __init__(self, port: int, number: int) -> None:
        received: list[str] = []
        server = self
        self.received, self.number, self.answer = received, number, "number"

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                received.append(self.path)
                if server.answer == "hang up":
                    self.close_connection = True
                    return
                if server.answer == "break off":
                    self.send_response(200)
                    self.send_header("Content-Length", "100")
                    self.end_headers()
                    self.wfile.write(b"half")
                    self.close_connection = True
                    return
                body = str(number).encode()
                self.send_response(503 if server.answer == "full" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None:
                return

        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Front:
    """The real nginx, and two stand-ins for replicas behind it."""

    def __init__(self, folder: Path) -> None:
        while True:
            port = free_port()
            try:
                self.replicas = [StandIn(port + FIRST_REPLICA_PORT, 0), StandIn(port + FIRST_REPLICA_PORT + 1, 1)]
                break
            except OSError:
                continue
        self.settings = Settings(log_dir=folder, api_host="127.0.0.1", api_port=port, replicas=2, request_timeout_s=5)
        self.url = f"http://127.0.0.1:{port}"
        (folder / "front").mkdir()
        self._conf = folder / "front.nginx.conf"
        self.write()
        self.process = subprocess.Popen([nginx(), "-p", f"{folder}/", "-c", str(self._conf)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def write(self, out: tuple[int, ...] = ()) -> None:
        self._conf.write_text(render_front(self.settings, out))

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/glm-front").text == "ok"
        except httpx.TransportError:
            return False

    def post(self, **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", content=b"{}", headers=headers, timeout=60)

    def places(self, count: int = 12, **headers: str) -> Counter[str]:
        return Counter(self.post(**headers).text for _ in range(count))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        for replica in self.replicas:
            replica.shutdown()
            replica.server_close()


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    started = Front(tmp_path)
    yield started
    started.close()


def test_a_conversation_stays_at_one_replica_and_others_go_anywhere(front: Front) -> None:
    by_session = [front.places(3, **{"x-session-id": f"chat-{number}"}) for number in range(12)]
    by_key = [front.places(3, **{"x-glm-cache-key": f"key-{number}"}) for number in range(12)]
    together = front.places(3, **{"x-session-id": "chat-0", "x-glm-cache-key": "another"})

    assert all(len(places) == 1 for places in by_session + by_key)
    assert {next(iter(places)) for places in by_session} == {next(iter(places)) for places in by_key} == {"0", "1"}
    assert together == by_session[0], "the session comes first"
    assert len(front.places(40)) == 2


@pytest.mark.parametrize("answer", ["hang up", "full"])
def test_a_question_that_one_replica_refuses_is_answered_by_the_other(front: Front, answer: str) -> None:
    front.replicas[0].answer = answer

    assert front.places(20) == Counter({"1": 20})
    assert front.replicas[0].received, "it was asked first"


def test_an_answer_that_has_begun_is_never_asked_for_again(front: Front) -> None:
    for replica in front.replicas:
        replica.answer = "break off"

    with pytest.raises(httpx.RemoteProtocolError):
        front.post()

    assert sum(len(replica.received) for replica in front.replicas) == 1


def test_if_all_refuse_the_refusal_is_theirs_and_if_none_runs_the_error_is_of_our_format(front: Front) -> None:
    for replica in front.replicas:
        replica.answer = "full"
    refused = front.post()
    for replica in front.replicas:
        replica.answer = "hang up"
    gone = front.post()

    assert (refused.status_code, refused.text in ("0", "1")) == (503, True)
    assert (gone.status_code, gone.json()["error"]["code"]) == (503, "not_running")
    assert int(gone.headers["Retry-After"]) > 0


def test_a_replica_that_is_out_gets_nothing_after_a_reload(front: Front) -> None:
    front.write(out=(0,))
    front.process.send_signal(1)  # SIGHUP
    deadline = time.monotonic() + 60
    while front.places(20) != Counter({"1": 20}):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_readings_are_of_a_replica_by_its_number(front: Front) -> None:
    assert httpx.get(f"{front.url}/replicas/1/metrics").text == "1"
    assert front.replicas[1].received == ["/metrics"]
    whole = httpx.get(f"{front.url}/metrics")
    assert whole.status_code == 404 and whole.json()["error"]["message"].endswith("GET /replicas/{0..1}/metrics.")
    log = [json.loads(line) for line in (front.settings.log_dir / "front.access.log").read_text().splitlines()]
    assert [(line["url"]["path"], line["http"]["response"]["status_code"]) for line in log] == [("/replicas/1/metrics", 200), ("/metrics", 404)]


@pytest.mark.parametrize("fields", [{"api_host": "::1"}, {"api_host": "0.0.0.0", "key_requests_per_minute": 5}, {"gpus": "0,1,2"}])
def test_nginx_takes_the_configuration_of_other_settings(tmp_path: Path, fields: dict[str, object]) -> None:
    (tmp_path / "front").mkdir()
    conf = tmp_path / "front.nginx.conf"
    conf.write_text(render_front(Settings(log_dir=tmp_path, replicas=1 if "gpus" in fields else 2, **fields), out=(1,)))

    done = subprocess.run([nginx(), "-t", "-p", f"{tmp_path}/", "-c", str(conf)], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert conf.read_text().count("max_fails=0") == (3 if "gpus" in fields else 2)


def test_a_log_folder_that_nginx_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProxyError, match="GLM_LOG_DIR must have no spaces"):
        render_front(Settings(log_dir=tmp_path / "a b", replicas=2))
