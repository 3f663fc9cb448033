"""The command line of vLLM's router in docs/fleet.md, in front of two replicas with the demo model. Runs where the router is found."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ports import free_port
from started_api import ROOT, WAIT_S, StartedApi, headers, long_question, picture_question

PAGE = (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")
CHAT = "/v1/chat/completions"


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[StartedApi]]:
    """With room for eight requests each, and the delay that the page says."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    settings = {"GLM_DRAIN_DELAY_S": "10", "GLM_SLOTS": "4", "GLM_QUEUE_SIZE": "4"}
    with StartedApi(folders[0], **settings) as one, StartedApi(folders[1], **settings) as other:
        yield [one, other]


@pytest.fixture
def router(replicas: list[StartedApi], tmp_path: Path) -> Iterator[str]:
    port = free_port()
    (printed,) = re.findall(r"^(vllm-router (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    words = shlex.split(printed.replace("\\\n", " "))
    real = {"8000": str(port), "http://127.0.0.1:8080": replicas[0].url, "http://127.0.0.1:8090": replicas[1].url}
    command = [real.get(word, word) for word in words] + ["--prometheus-port", str(free_port())]
    with (tmp_path / "router.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while not _answers(url):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "router.log").read_text()[-4000:]
        time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", headers=headers(), timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def sessions_of(api: StartedApi) -> list[str]:
    lines = [line for line in api.log.read_text().splitlines() if f"path={CHAT}" in line and "status=200" in line]
    return [found[1] for line in lines if (found := re.search(r" session=(\S+)", line))]


def ask(client: httpx.Client, session: str) -> httpx.Response:
    return client.post(CHAT, json=picture_question(max_tokens=8), headers={"x-session-id": session})


def test_a_refusal_is_repeated_at_the_same_replica(router: str, replicas: list[StartedApi]) -> None:
    def long(number: int) -> int:
        with httpx.Client(base_url=router, headers={**headers(), "x-session-id": "one-chat"}, timeout=WAIT_S) as client:
            return client.post(CHAT, json=long_question(100)).status_code

    with ThreadPoolExecutor(12) as pool:
        statuses = Counter(pool.map(long, range(12)))

    assert statuses == {200: 8, 503: 4}, "docs/fleet.md says that it does not go on to the next one"
    assert sorted(len(sessions_of(replica)) for replica in replicas) == [0, 8]


def test_sessions_stay_on_one_replica_and_move_when_it_is_stopped(router: str, replicas: list[StartedApi]) -> None:
    sessions = [f"chat-{number}" for number in range(8)]
    with httpx.Client(base_url=router, headers=headers(), timeout=WAIT_S) as client:
        answers = [ask(client, session) for _ in range(3) for session in sessions]
        assert {answer.status_code for answer in answers} == {200}
        homes = [set(sessions_of(replica)) for replica in replicas]
        assert homes[0] and homes[1] and not homes[0] & homes[1]
        cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers[8:]]
        assert min(cached) > 0, "a later question finds its picture"

        replicas[0].process.send_signal(signal.SIGTERM)
        statuses = []
        while replicas[0].process.poll() is None:
            statuses += [ask(client, session).status_code for session in sessions]
        statuses += [ask(client, session).status_code for session in sessions]

    assert set(statuses) == {200}
    assert set(sessions_of(replicas[1])) == set(sessions)
    assert httpx.post(router + CHAT, json=picture_question(), timeout=WAIT_S).status_code == 401, "the client's key counts"
