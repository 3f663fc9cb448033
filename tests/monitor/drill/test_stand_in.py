"""The external engine that the drill breaks: it passes everything on until it is told what to become."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request

import pytest
from stand_in_model import completion

from monitor.drill import stand_in
from monitor.drill.faults import ports

FROZEN = b"glm_num_requests_running 1.0\nglm_generation_tokens_total 7.0\n"
QUESTION = json.dumps({"messages": [{"role": "user", "content": "What is it?"}]}).encode()


@pytest.fixture
def engine(service, behaviour):
    behaviour.text_reply = lambda body: (200, completion("A red heart, 3 of them."))
    behaviour.other["/metrics"] = (200, b"glm_num_requests_running 0.0\nglm_generation_tokens_total 7.0\n")
    with ports.stand_in("right", upstream=f"http://127.0.0.1:{service}") as server:
        yield server


def ask(engine: ports.StandIn) -> str:
    with urllib.request.urlopen(f"{engine.url}/v1/chat/completions", QUESTION, timeout=10) as response:
        return response.read().decode()


def text(stream: str) -> str:
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks).strip()


def test_it_passes_everything_on(engine):
    assert text(ask(engine)) == "A red heart, 3 of them."
    with urllib.request.urlopen(f"{engine.url}/health", timeout=10) as response:
        assert json.load(response)["state"] == "idle"


def test_wrong_answers_are_whole_answers_with_other_names(engine):
    engine.becomes("wrong")

    stream = ask(engine)
    assert text(stream) == "A green star, 4 of them." and stream.endswith("data: [DONE]\n\n")


def test_a_hanging_engine_looks_alive_and_answers_nothing(engine, behaviour):
    engine.becomes("hangs")
    metrics = urllib.request.Request(f"{engine.url}/metrics", headers={"Authorization": "Bearer sk-1"})

    shown = []
    for asked in (metrics, f"{engine.url}/health", metrics):
        with urllib.request.urlopen(asked, timeout=10) as response:
            shown.append(response.read())
        behaviour.other["/metrics"] = (200, b"glm_generation_tokens_total 8.0\n")
    assert shown == [FROZEN, b"", FROZEN]
    assert behaviour.read_with["/metrics"] == "Bearer sk-1", "an engine with a key shows its metrics to nobody else"
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(f"{engine.url}/v1/chat/completions", QUESTION, timeout=0.5)


def test_a_failing_engine_answers_500(engine):
    engine.becomes("failing")

    with pytest.raises(urllib.error.HTTPError, match="500"):
        ask(engine)


def test_an_endless_line_has_no_end(engine):
    engine.becomes("endless")
    connection = http.client.HTTPConnection(engine.url.removeprefix("http://"), timeout=10)
    connection.request("POST", "/v1/chat/completions", QUESTION)

    start = connection.getresponse().read(8 * 2**20)
    connection.close()
    assert start.startswith(b"data: xxx") and b"\n" not in start and len(start) == 8 * 2**20


def test_every_exchanged_name_is_exchanged_back():
    words = {a: b for a, b in stand_in.EXCHANGED.items() if not a.isdigit()}
    assert all(words[words[word]] == word for word in words)
    assert all(stand_in.EXCHANGED[digit] != digit for digit in "0123456789")
