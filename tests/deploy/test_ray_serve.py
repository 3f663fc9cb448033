"""deploy/ray on a Ray cluster of two nodes on this machine, with the demo model: the tests follow one another on it, in their order."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ports import free_port
from started_api import KEY, PROBE_TOKEN, ROOT, headers, long_question, picture_question

from api.engine.scheduler import queue_for

CHAT = "/v1/chat/completions"
CONFIG = ROOT / "deploy" / "ray" / "serve.yaml"
MARK = "GLM_LOG_DIR"  # in the environment of every process of the cluster
KEPT = Path.home() / ".cache" / "glm-web-tests"  # Ray's environment is kept there for the next run
INSTALL_S = 900.0
WAIT_S = 180.0
STALL_S = 5.0  # an engine's step is given at least 30 s all the same
ONGOING = 4  # requests at once at one replica


def config(port: int, least: int) -> dict[str, Any]:
    """The file of the docs, for this machine: no cards, another port, and times in which a test can wait for it."""
    described = yaml.safe_load(CONFIG.read_text())
    described |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (application,) = described["applications"]
    application["args"] = {"gpus": 0}
    (replica,) = application["deployments"]
    replica["max_ongoing_requests"] = ONGOING
    replica["autoscaling_config"] |= {
        "min_replicas": least, "max_replicas": 2, "target_ongoing_requests": 2,
        "upscale_delay_s": 1, "downscale_delay_s": 3, "look_back_period_s": 2, "metrics_interval_s": 0.5,
    }  # fmt: skip
    return described


class Cluster:
    """ray_cluster.py, and what it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "cluster.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.sockets = tempfile.mkdtemp(prefix="ray-")  # their names must be short
        for number in range(25):
            (folder / "ray" / f"earlier-{number}").mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GLM_", "RAY_"))}
        self.environment = {
            **kept, "OMP_NUM_THREADS": "1", "GLM_MODEL": "models/shapes", "GLM_API_KEY": KEY,
            "GLM_PROBE_TOKEN": PROBE_TOKEN, MARK: str(folder), "GLM_STALL_S": str(STALL_S), "GLM_TEST_FAULTS": "true",
            "RAY_ENVIRONMENT": str(KEPT / "ray"), "PIP_NO_CACHE_DIR": "1", "RAY_TMPDIR": self.sockets,
            "RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0",  # others use this machine too
            "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        }  # fmt: skip
        command = [ROOT / "deploy" / "ray" / "run.sh", "python", ROOT / "tests" / "deploy" / "ray_cluster.py"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        assert self._answer(INSTALL_S) == "ready"

    def ask(self, *command: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self, limit_s: float = WAIT_S) -> Any:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"no answer\n{self.log.read_text()[-6000:]}"
        return json.loads(line)

    def apply(self, least: int) -> None:
        self.ask("apply", config(self.port, least))

    def running(self) -> dict[str, Replica]:
        return {name: Replica(self.folder / "ray" / name, node, pid) for name, node, pid, state in self.ask("replicas") if state == "RUNNING"}

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"{self.ask('status')}\n{self.ask('replicas')}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.3)

    def settle(self, replicas: int) -> dict[str, Replica]:
        """Waits until so many replicas run, and none besides."""
        self.until(lambda: len(self.ask("replicas")) == len(self.running()) == replicas)
        return self.running()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            left = self.processes()
            for process in left:
                process.kill()
            shutil.rmtree(self.sockets, ignore_errors=True)
        assert left == []


class Replica:
    def __init__(self, folder: Path, node: str, pid: int) -> None:
        self.folder, self.node, self.pid = folder, node, pid

    def sessions(self) -> list[str]:
        """The session of each question that was answered here, in order."""
        lines = [line for line in (self.folder / "api.log").read_text().splitlines() if f"path={CHAT}" in line and "status=200" in line]
        return [word.removeprefix("session=") for line in lines for word in line.split() if word.startswith("session=")]

    def fault(self, name: str) -> None:
        (self.folder / "api.fault").write_text(json.dumps({"fault": name, "pid": self.pid}))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("ray"))
    yield made
    made.end()


class Load:
    """Users who ask one question after the other. `ended` has how each question ended, by session."""

    def __init__(self, cluster: Cluster, users: int, tokens: int) -> None:
        self._url, self._tokens = cluster.url, tokens
        self._stop = threading.Event()
        self.ended: dict[str, list[str]] = {f"user-{number}": [] for number in range(users)}
        self._threads = [threading.Thread(target=self._ask, args=(session,)) for session in self.ended]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _ask(self, session: str) -> None:
        while not self._stop.is_set():
            self.ended[session].append(outcome(self._url, session, long_question(self._tokens, stream=True)))

    def count(self) -> Counter[str]:
        return Counter(each for ended in self.ended.values() for each in ended)

    def least(self) -> int:
        return min(map(len, self.ended.values()))


def outcome(url: str, session: str, body: dict[str, Any]) -> str:
    """`answered`, `error` where the server says so, `broken` where the connection ends, or `hangs`."""
    try:
        with httpx.stream("POST", url + CHAT, json=body, headers={**headers(), "x-session-id": session}, timeout=WAIT_S) as answer:
            text = answer.read().decode()
    except httpx.TimeoutException:
        return "hangs"
    except httpx.TransportError:
        return "broken"
    if answer.status_code == 200 and text.endswith("data: [DONE]\n\n") and '"error"' not in text:
        return "answered"
    assert answer.status_code >= 400 or '"error"' in text, text[-300:]
    return "error"


def ask(cluster: Cluster, body: dict[str, Any], **more: str) -> httpx.Response:
    return httpx.post(cluster.url + CHAT, json=body, headers={**headers(), **more}, timeout=WAIT_S)


def test_the_file_of_the_docs_fits_ray_and_the_api(cluster: Cluster) -> None:
    described = cluster.ask("parse", yaml.safe_load(CONFIG.read_text()))

    (application,) = described["applications"]
    (replica,) = application["deployments"]
    assert described["proxy_location"] == "EveryNode"
    assert replica["autoscaling_config"]["max_replicas"] == 4
    assert replica["max_ongoing_requests"] <= 1 + queue_for(1), "the API refuses none of them, however few slots it has"


def test_settings_that_no_replica_could_start_with_are_refused_at_once(cluster: Cluster) -> None:
    build = "from deploy.ray.application import Arguments, build; build(Arguments())"
    command = [ROOT / "deploy" / "ray" / "run.sh", "python", "-c", build]
    done = subprocess.run(
        command, cwd=ROOT, env={**cluster.environment, "GLM_ENGINE_URL": "http://127.0.0.1:1"}, capture_output=True, text=True, timeout=WAIT_S
    )

    assert done.returncode == 1 and "GLM_ENGINE_URL: must be empty under Ray Serve" in done.stderr, done.stderr


def test_a_replica_answers_questions_about_pictures_streamed_or_not(cluster: Cluster) -> None:
    cluster.apply(1)
    cluster.settle(1)

    whole = ask(cluster, picture_question())
    streamed = ask(cluster, picture_question(stream=True))
    without_key = httpx.post(cluster.url + CHAT, json=picture_question(), timeout=WAIT_S)

    content = whole.json()["choices"][0]["message"]["content"]
    assert "red" in content and "circle" in content
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]) == content
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert without_key.status_code == 401
    assert len(whole.headers.get_list("x-request-id")) == 1
    folders = list((cluster.folder / "ray").iterdir())
    assert len(folders) == 20 and (running := list(cluster.running().values())) and running[0].folder in folders, "the oldest are removed"


def test_load_brings_a_second_replica_and_replaces_none(cluster: Cluster) -> None:
    (first,) = cluster.running()

    with Load(cluster, 8, 60) as load:
        cluster.until(lambda: len(cluster.running()) == 2)
        load.ended = {session: [] for session in load.ended}
        cluster.until(lambda: load.least() >= 2)

    assert set(load.count()) == {"answered"}
    assert first in cluster.running()
    assert len({replica.node for replica in cluster.running().values()}) == 2
    cluster.apply(2)


def test_a_session_stays_with_a_replica_while_it_has_room(cluster: Cluster) -> None:
    replicas = cluster.settle(2)
    sessions = [f"chat-{number}" for number in range(12)]
    for _ in range(3):
        for session in sessions:
            answer = ask(cluster, picture_question(max_tokens=8), **{"x-session-id": session})
            assert answer.status_code == 200
    homes = {session: [name for name, replica in replicas.items() if session in replica.sessions()] for session in sessions}

    assert all(len(home) == 1 for home in homes.values()), homes
    assert {home for (home,) in homes.values()} == set(replicas), "both answer"
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_the_key_of_an_answer_is_a_session_too(cluster: Cluster) -> None:
    key = ask(cluster, picture_question(max_tokens=8)).headers["x-glm-cache-key"]
    replicas = cluster.running()
    before = {name: (replica.folder / "api.log").read_text().count(f"path={CHAT}") for name, replica in replicas.items()}
    for _ in range(6):
        ask(cluster, picture_question(max_tokens=8), **{"x-glm-cache-key": key})
    asked = {name: (replica.folder / "api.log").read_text().count(f"path={CHAT}") - before[name] for name, replica in replicas.items()}
    for number in range(6):
        ask(cluster, picture_question(max_tokens=8), **{"x-glm-cache-key": f"key-{number}", "x-session-id": "the-one"})

    assert sorted(asked.values()) == [0, 6]
    assert sorted(replica.sessions().count("the-one") for replica in replicas.values()) == [0, 6], "the session comes first"


def test_a_full_replica_leaves_its_session_to_the_next(cluster: Cluster) -> None:
    replicas = cluster.running()
    streams = [threading.Thread(target=outcome, args=(cluster.url, "crowd", long_question(600, stream=True))) for _ in range(ONGOING + 2)]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join(WAIT_S)

    assert all("crowd" in replica.sessions() for replica in replicas.values())
    assert sorted(replica.sessions().count("crowd") for replica in replicas.values()) == [2, ONGOING]


def test_a_replica_that_hangs_fails_its_requests_and_is_replaced(cluster: Cluster) -> None:
    before = cluster.settle(2)
    wedged, sound = before
    with Load(cluster, 6, 60) as load:
        cluster.until(lambda: load.least() >= 1)
        before[wedged].fault("hang-step")
        cluster.until(lambda: wedged not in cluster.running())
        cluster.until(lambda: len(cluster.running()) == 2)
        load.ended, faulty = {session: [] for session in load.ended}, load.ended
        cluster.until(lambda: load.least() >= 2)

    assert "replica_lost" in (before[wedged].folder / "api.log").read_text()
    assert not psutil.pid_exists(before[wedged].pid)
    assert set(Counter(each for ended in faulty.values() for each in ended)) == {"answered", "error"}
    assert sound in cluster.running()


def test_a_node_is_killed_under_load_and_replaced(cluster: Cluster) -> None:
    before = cluster.settle(2)
    with Load(cluster, 6, 60) as load:
        cluster.until(lambda: load.least() >= 1)
        node = cluster.ask("kill-node")
        (gone,) = [name for name, replica in before.items() if replica.node == node]
        cluster.until(lambda: gone not in cluster.running())
        first_part = load.count()
        cluster.ask("add-node")
        cluster.until(lambda: len(cluster.running()) == 2)
        load.ended, faulty = {session: [] for session in load.ended}, load.ended
        cluster.until(lambda: load.least() >= 2)

    assert first_part["answered"], "the other one goes on"
    assert set(Counter(each for ended in faulty.values() for each in ended)) <= {"answered", "error", "broken"}
    assert set(load.count()) == {"answered"}


def test_a_replica_that_is_scaled_away_finishes_its_answers(cluster: Cluster) -> None:
    before = cluster.settle(2)
    ended: dict[str, str] = {}

    def long_answer(session: str) -> None:
        ended[session] = outcome(cluster.url, session, long_question(1500, stream=True))

    homes: dict[str, str] = {}
    for number in range(20):
        session = f"long-{number}"
        ask(cluster, long_question(1), **{"x-session-id": session})
        (home,) = [name for name, replica in before.items() if session in replica.sessions()]
        homes.setdefault(home, session)
    assert set(homes) == set(before)
    asking = [threading.Thread(target=long_answer, args=(session,)) for session in homes.values()]
    for each in asking:
        each.start()
    cluster.apply(1)
    cluster.until(lambda: len(cluster.running()) == 1)
    assert not ended, "the answers must last longer than the decision"
    with Load(cluster, 2, 10) as load:
        cluster.until(lambda: len(ended) == 2)
    cluster.settle(1)

    assert set(ended.values()) == set(load.count()) == {"answered"}
