"""The examples of docs/scaling.md: nginx in front of two replicas with the demo model, one of which is stopped; and Kubernetes' probes."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import httpx
import pytest
import yaml
from nginx_process import AROUND
from ports import free_port
from started_api import KEY, PROBE_TOKEN, ROOT, WAIT_S, StartedApi, headers, long_question, picture_question

from api.http.auth import OPEN_PATHS
from monitor import check
from monitor.observe import processes
from settings import Settings

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
CHAT = "/v1/chat/completions"
SESSIONS = [f"chat-{number}" for number in range(8)]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[StartedApi]]:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with StartedApi(folders[0]) as one, StartedApi(folders[1]) as other:
        yield [one, other]


@pytest.fixture
def router(replicas: list[StartedApi], tmp_path: Path) -> Iterator[str]:
    port = free_port()
    text = block("nginx")
    for printed, real in ((":8080", replicas[0].port), (":8090", replicas[1].port), (":8000", port)):
        assert text.count(f"127.0.0.1{printed}") == 1
        text = text.replace(f"127.0.0.1{printed}", f"127.0.0.1:{real}")
    (tmp_path / "glm.conf").write_text(f"access_log off;\n{text}")
    (tmp_path / "nginx.conf").write_text(AROUND.format(folder=tmp_path))
    command = [which("nginx") or "/usr/sbin/nginx", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-g", "daemon off;"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while not _answers(url):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "around.log").read_text()
        time.sleep(0.05)
    yield url
    process.terminate()
    process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def sessions_of(api: StartedApi) -> list[str]:
    """The session of each answered question."""
    lines = [line for line in api.log.read_text().splitlines() if f"path={CHAT}" in line and "status=200" in line]
    return [found[1] for line in lines if (found := re.search(r" session=(\S+)", line))]


def test_a_replica_is_stopped_under_load_and_every_question_is_answered(router: str, replicas: list[StartedApi]) -> None:
    answers: dict[str, list[tuple[int, str]]] = {session: [] for session in SESSIONS}
    stop = threading.Event()

    def ask(session: str) -> None:
        with httpx.Client(headers={**headers(), "x-session-id": session}, timeout=WAIT_S) as client:
            while not stop.is_set():
                with client.stream("POST", router + CHAT, json=long_question(12, stream=True)) as answer:
                    answers[session].append((answer.status_code, answer.read().decode()[-40:]))

    asking = [threading.Thread(target=ask, args=(session,)) for session in SESSIONS]
    for each in asking:
        each.start()
    while min(map(len, answers.values())) < 3:
        time.sleep(0.05)
    homes = [set(sessions_of(replica)) for replica in replicas]
    replicas[0].process.send_signal(signal.SIGTERM)
    assert replicas[0].process.wait(WAIT_S) == 0
    before = {session: len(done) for session, done in answers.items()}
    while any(len(answers[session]) < before[session] + 3 for session in SESSIONS):
        time.sleep(0.05)
    stop.set()
    for each in asking:
        each.join(WAIT_S)

    assert homes[0] and homes[1] and not homes[0] & homes[1], "a session was on both, or one had none"
    assert homes[0] | homes[1] == set(SESSIONS)
    wrong = [(session, *each) for session, done in answers.items() for each in done if each[0] != 200 or "[DONE]" not in each[1]]
    assert wrong == []
    assert set(sessions_of(replicas[1])) == set(SESSIONS), "those of the stopped one went on at the other"


def test_questions_with_the_key_of_the_first_answer_find_its_picture(router: str, replicas: list[StartedApi]) -> None:
    with httpx.Client(base_url=router, headers=headers(), timeout=WAIT_S) as client:
        first = client.post(CHAT, json=picture_question(max_tokens=8))
        place = {"x-session-id": first.headers["x-glm-cache-key"]}
        cached = [
            client.post(CHAT, json=picture_question(max_tokens=8), headers=place).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for _ in range(4)
        ]

    assert min(cached[1:]) > 0
    homes = [replica for replica in replicas if place["x-session-id"] in sessions_of(replica)]
    assert len(homes) == 1 and len(sessions_of(homes[0])) == 4


def test_the_checker_leaves_a_replica_alone_that_drains(tmp_path: Path) -> None:
    delay_s = 30.0
    with StartedApi(tmp_path, GLM_DRAIN_DELAY_S=str(delay_s)) as replica:
        pid, stat = replica.process.pid, processes.read_stat(replica.process.pid)
        assert stat is not None
        processes.write_record(tmp_path, "api", processes.ProcessRecord(pid, stat.start_time, replica.port, processes.boot_id()))
        keys = {"api_key": KEY, "probe_token": PROBE_TOKEN}
        settings = Settings(log_dir=tmp_path, api_port=replica.port, drain_delay_s=delay_s, confirm_runs=1, **keys)
        replica.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()

        runs = [check.run(settings, random.Random(seed)).report for seed in range(2)]

        assert time.monotonic() < signalled + delay_s, "the machine is too slow: nothing was shown"
        assert replica.process.poll() is None
        verdicts = [run["targets"]["api"] for run in runs]
        assert [(each["word"], each["rule"]) for each in verdicts] == [("degraded", "draining")] * 2
        assert f"path={CHAT}" not in replica.log.read_text(), "it was asked questions"
        assert replica.process.wait(WAIT_S) == 0
        assert time.monotonic() >= signalled + delay_s - 0.1
    log = replica.log.read_text()
    assert log.count("event=drain signal") == 1, "it was told again to end"


def test_the_deployment_agrees_with_the_code() -> None:
    pod = yaml.safe_load(block("yaml"))["spec"]["template"]["spec"]
    api = pod["containers"][0]
    settings = Settings(**{entry["name"].removeprefix("GLM_").lower(): entry["value"] for entry in api["env"]})
    ready, alive = (api[name] for name in ("readinessProbe", "livenessProbe"))

    assert (settings.drain_delay_s, settings.metrics_names) == (15, "vllm")
    assert pod["terminationGracePeriodSeconds"] >= settings.stop_s + 10
    assert settings.drain_delay_s >= 2 * ready["periodSeconds"] * ready["failureThreshold"]
    assert [probe["httpGet"] for probe in (ready, alive)] == [{"path": path, "port": settings.api_port} for path in ("/readyz", "/livez")]
    assert {"/readyz", "/livez"} <= OPEN_PATHS, "a probe has no key"
    assert api["args"][1:] == ["-m", "api.server"] and api["ports"] == [{"containerPort": settings.api_port}]
