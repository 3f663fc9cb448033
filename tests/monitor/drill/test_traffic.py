"""The users of the drill: what each of them sees is counted."""

from __future__ import annotations

import time

import pytest
from stand_in_model import completion

from monitor.drill import traffic
from monitor.drill.traffic import Traffic


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(traffic, "PICTURE_SIZE", (64, 48))


def outcomes(port: int, kinds: tuple[str, ...], seconds: float = 0.6) -> set[str]:
    users = Traffic(f"http://127.0.0.1:{port}", "")
    with users.running(len(kinds), kinds):
        deadline = time.monotonic() + 10
        while not users.outcomes and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
    return set(users.outcomes)


def test_answers_refusals_and_failures_are_told_apart(service, behaviour):
    assert outcomes(service, ("text", "picture", "schema")) == {"answered"}
    behaviour.text_reply = lambda body: (503, {"error": {"code": "queue_full"}})
    assert outcomes(service, ("text",)) == {"refused"}
    behaviour.text_reply = lambda body: (500, {"error": {"message": "broken"}})
    assert outcomes(service, ("text",)) == {"failed: HTTP 500"}


def test_a_stream_without_its_end_has_failed(service, behaviour):
    behaviour.end_marker = False
    assert outcomes(service, ("text",)) == {"failed: cut"}


def test_a_user_who_goes_away_counts_as_aborted(service, behaviour):
    behaviour.text_reply = lambda body: (200, completion("word " * 200))
    assert outcomes(service, ("abort",)) == {"aborted"}


def test_each_picture_is_new_and_a_schema_binds_the_answer(service, behaviour):
    outcomes(service, ("picture", "schema"))

    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in behaviour.questions]
    assert len(set(urls)) == len(urls) > 2
    assert any(body.get("response_format") == traffic.SCHEMA for body in behaviour.questions)
