"""Each request of a user is counted once, as the user saw it end, whichever layer has failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fake_model import fake_model
from served import Served, chat_body, image_part, text_part, wait_for

from api.health.outcomes import MOST_CALLERS, RECENT_S, Outcomes
from api.http.auth import KeyRing
from api.protocol.completion import ChatFormatter
from api.requests.admission import Admission

WAIT_S = 30.0
PICTURE = [image_part(), text_part("hi")]


def counts(served: Served) -> dict[str, dict[str, int]]:
    return served.client.get("/health").json()["outcomes"]


def answered(text: int = 0, picture: int = 0) -> dict[str, dict[str, int]]:
    return {"answered": {"text": text, "picture": picture}, "failed": {}}


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_answers_are_counted_by_kind_and_once_for_all_choices(serve) -> None:
    served = serve()

    assert counts(served) == answered()
    served.chat("hi", n=2)
    served.stream("hi")
    served.stream(PICTURE)
    served.client.post("/v1/responses", json={"input": "hi"})
    served.client.post("/tokenize", json={"prompt": "hi"})

    assert counts(served) == answered(text=3, picture=1), "turning text into tokens is no answer"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("FAIL", {}, "engine"),
        ("CRASH", {}, "dead"),
        ("a slow one", {"token_s": 0.2, "request_timeout_s": 0.1}, "deadline"),
    ],
)
def test_what_the_engine_gives_up_is_a_failure(serve, prompt: str, options: dict, reason: str, stream: bool) -> None:
    served = serve(**options)

    failed = served.chat(prompt, stream=stream)

    assert failed.status_code >= 500 or (stream and '"error"' in failed.text)
    assert counts(served) == {**answered(), "failed": {reason: 1}}


def test_running_out_of_memory_is_a_failure_although_its_status_is_413(serve) -> None:
    served = serve()
    served.runner.most_rows = 0

    assert served.chat("hi").status_code == 413
    assert counts(served)["failed"] == {"out_of_memory": 1}


def test_refusals_by_a_dead_engine_are_failures(serve) -> None:
    served = serve()
    served.chat("CRASH")
    wait_for(lambda: served.engine.stats().state == "dead")

    assert served.chat("hi").status_code == 503
    assert counts(served)["failed"] == {"dead": 2}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", ["opening", "format", "closing"])
def test_an_answer_that_cannot_be_written_has_failed(serve, monkeypatch, broken: str, stream: bool) -> None:
    """Even if the engine has finished it: `closing` comes after that."""
    served = serve()
    monkeypatch.setattr(ChatFormatter, broken, raising(RuntimeError("broken")))

    failed = served.chat("hi", stream=stream)

    assert failed.status_code == (200 if stream else 500) and "internal_error" in failed.text
    assert counts(served) == {**answered(), "failed": {"internal": 1}}


OUTSIDE = {
    "authentication": (KeyRing, "caller"),
    "admission": (Admission, "admit"),
}


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_failure_before_the_handler_is_counted(serve, monkeypatch, place: str) -> None:
    served = serve()
    monkeypatch.setattr(*OUTSIDE[place], raising(MemoryError()))

    assert served.chat("hi").status_code == 500
    monkeypatch.undo()
    assert counts(served)["failed"] == {"memory": 1}


def test_a_failure_in_the_preparation_of_a_picture_is_counted(serve, monkeypatch) -> None:
    served = serve()
    monkeypatch.setattr(type(served.model.image_processor), "process", raising(MemoryError("no room")))

    assert [served.chat(PICTURE, stream=stream).status_code for stream in (False, True)] == [500, 500]
    assert counts(served)["failed"] == {"memory": 2}


def test_a_failure_in_answering_an_error_is_counted(serve, monkeypatch) -> None:
    served = serve(key_requests_per_minute=1)
    served.chat("hi")
    monkeypatch.setattr(served.app.state.server.metrics, "rejected", raising(ValueError("broken")))

    assert served.chat("hi").status_code == 500
    assert counts(served) == {**answered(text=1), "failed": {"internal": 1}}


def test_a_failed_tokenization_is_counted(serve, monkeypatch) -> None:
    served = serve()
    monkeypatch.setattr("api.routes.tokens._ids", raising(MemoryError()))

    assert served.client.post("/tokenize", json={"prompt": "hi"}).status_code == 500
    assert counts(served)["failed"] == {"memory": 1}


def test_refusals_for_load_and_bad_requests_are_no_failures(serve) -> None:
    served = serve(key_requests_per_minute=2, max_body_bytes=2000)
    bad = [
        served.chat("hi", temperature=-1),
        served.chat("hi" * 2000),
        served.chat("hi"),
        served.client.post("/v1/chat/completions", json=chat_body(), headers={"Authorization": "Bearer x"}),
        served.client.post("/nothing"),
        served.chat("hi"),
        served.chat("hi"),
    ]
    assert [answer.status_code for answer in bad] == [400, 413, 200, 401, 404, 429, 429]
    assert counts(served) == answered(text=1)


def test_a_full_queue_loading_and_draining_are_no_failures(serve) -> None:
    full, go = serve(queue_size=1), threading.Event()
    full.app.state.server.admission.active = 100
    assert full.chat("hi").json()["error"]["code"] == "queue_full"
    full.app.state.server.admission.active = 0
    full.engine.drain(0)
    assert full.chat("hi").json()["error"]["code"] == "draining"

    def load(progress: Any) -> Any:
        go.wait(WAIT_S)
        return fake_model()

    loading = serve(load=load)
    assert loading.chat("hi").json()["error"]["code"] == "loading"
    go.set()

    assert counts(full) == counts(loading) == answered()


def test_what_a_planned_end_cuts_off_is_no_failure(serve) -> None:
    served, answers = serve(token_s=0.05), []
    asking = threading.Thread(target=lambda: answers.append(served.chat("a long answer, please", max_tokens=900)))
    asking.start()
    wait_for(lambda: served.engine.stats().running == 1)
    served.engine.drain(0)
    asking.join(WAIT_S)

    assert answers[0].status_code == 503
    assert counts(served) == answered()


@pytest.mark.parametrize("token", ["pt", "wrong"])
def test_probes_count_for_nothing_even_with_a_wrong_token(serve, token: str) -> None:
    served = serve(probe_token="pt")
    served.client.headers["x-glm-probe"] = token

    assert [served.chat("hi").status_code, served.chat("FAIL").status_code] == [200, 500]

    assert counts(served) == answered() and served.client.get("/health").json()["success_age_s"] == {}
    lines = served.client.get("/metrics").text.splitlines()
    assert not [line for line in lines if 'traffic="user"' in line and float(line.rsplit(" ", 1)[1])]


def test_a_wrong_probe_token_gives_no_privilege(serve) -> None:
    served = serve(queue_size=1, probe_token="pt")
    served.app.state.server.admission.active = 100

    def status(token: str) -> int:
        answer = served.client.post("/v1/chat/completions", json=chat_body(), headers={"x-glm-probe": token})
        return answer.status_code

    assert (status("pt"), status("wrong")) == (200, 503)
    served.app.state.server.admission.active = 0


def test_one_callers_failures_are_told_from_those_of_several(serve) -> None:
    served = serve(api_keys="ann:key-a,bob:key-b")

    def fail(key: str) -> dict[str, int]:
        served.client.post("/v1/chat/completions", json=chat_body("FAIL"), headers={"Authorization": f"Bearer {key}"})
        return served.client.get("/health").json()["failed_callers"]

    assert [fail("key-a"), fail("key-a"), fail("key-b")] == [{"engine": 1}, {"engine": 1}, {"engine": 2}]


def test_callers_are_forgotten_after_a_while_and_only_some_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Outcomes()
    for number in range(100):
        found.failed("grammar", f"caller {number}")
    assert found.failed_callers() == {"grammar": MOST_CALLERS}

    later = time.monotonic() + RECENT_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert found.failed_callers() == {}
