"""A streamed answer, read from a real HTTP server."""

from __future__ import annotations

import time

import pytest
from page_process import wait_until
from ports import free_port
from web_fake_api import Answer, FakeApi

from web.api_client import answer_stream
from web.api_client.answer_stream import AnswerStream, Event, Finished, Loading, Queued, ReasoningDelta, TextDelta
from web.api_client.client import ApiClient, ApiError

QUESTION = {"messages": [{"role": "user", "content": "What color is it?"}]}


def read_all(url: str) -> list[Event]:
    with AnswerStream(ApiClient(url), QUESTION) as stream:
        return [event for batch in stream.batches() for event in batch]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_an_answer_arrives_with_its_reasoning_its_end_and_its_figures(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="It is red.", reasoning="I look.")

    events = read_all(fake_api.url)

    assert text_of(events).strip() == "It is red."
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)).strip() == "I look."
    assert events[-1] == Finished("stop", 7, 90, ttft_s=0.25, tokens_per_s=40.0, request_id="req-42")


def test_the_request_asks_for_a_stream_with_usage(fake_api: FakeApi) -> None:
    read_all(fake_api.url)

    body = fake_api.received[0].body
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_heartbeats_report_the_queue_position(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(queue=2, queue_pause_s=0.05)

    events = read_all(fake_api.url)

    assert [event for event in events if isinstance(event, Queued)] == [Queued(2), Queued(1)]


def test_batches_keep_coming_while_the_api_is_silent(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(head_delay_s=30)

    with AnswerStream(ApiClient(fake_api.url), QUESTION) as stream:
        batches = stream.batches(wait_s=0.05)
        assert [next(batches) for _ in range(3)] == [[], [], []]


def test_closing_disconnects_from_the_api_at_once(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="word " * 1000, pause_s=0.05)

    with AnswerStream(ApiClient(fake_api.url), QUESTION) as stream:
        next(batch for batch in stream.batches() if batch)
        closed_at = time.monotonic()
    wait_until(lambda: fake_api.received[0].left_at, "the API to see the disconnect", 10)

    assert fake_api.received[0].left_at is not None
    assert fake_api.received[0].left_at - closed_at < 2
    assert fake_api.received[0].words_sent < 100


def test_closing_while_queued_disconnects_from_the_api_at_once(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(queue=1, queue_pause_s=60)

    with AnswerStream(ApiClient(fake_api.url), QUESTION) as stream:
        next(batch for batch in stream.batches() if batch)
        closed_at = time.monotonic()
    wait_until(lambda: fake_api.received[0].left_at, "the API to see the disconnect", 10)

    assert (fake_api.received[0].left_at or 0) - closed_at < 2


def test_a_question_is_retried_while_the_model_loads(fake_api: FakeApi) -> None:
    fake_api.health = {"state": "loading", "progress": 0.25}
    fake_api.answer = Answer(status=503, error={"code": "loading"}, headers={"Retry-After": "0.1"})
    seen: list[Event] = []

    with AnswerStream(ApiClient(fake_api.url), QUESTION) as stream:
        for batch in stream.batches():
            seen += batch
            if any(isinstance(event, Loading) for event in batch):
                fake_api.answer = Answer(text="Ready now.")

    assert seen[0] == Loading(0.25)
    assert text_of(seen).strip() == "Ready now."


def test_a_question_waits_for_as_long_as_a_download_moves(fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_stream, "LOADING_STILL_S", 0.5)
    fake_api.answer = Answer(status=503, error={"code": "loading"}, headers={"Retry-After": "0.05"})
    began, seen = time.monotonic(), 0

    def health(done: int) -> dict[str, object]:
        return {"state": "loading", "progress": 0.1, "download": {"hub": "A hub", "downloaded_bytes": done, "total_bytes": 10**9}}

    with pytest.raises(ApiError) as caught, AnswerStream(ApiClient(fake_api.url), QUESTION) as stream:
        for batch in stream.batches():
            seen += len(batch)
            if time.monotonic() - began < 2.0:  # four times as long as it may stand still; then it does
                fake_api.health = health(seen)

    assert 2.0 < time.monotonic() - began < 10.0
    assert caught.value.kind == "loading"


def test_an_unreachable_api_is_down() -> None:
    with pytest.raises(ApiError) as caught:
        read_all(f"http://127.0.0.1:{free_port()}")

    assert caught.value.kind == "down"


def test_a_refusal_carries_the_api_s_message_and_the_request_id(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(status=400, error={"message": "`seed` must be >= 0. Given: -1", "code": "invalid_value"})

    with pytest.raises(ApiError) as caught:
        read_all(fake_api.url)

    assert (caught.value.kind, caught.value.request_id) == ("refused", "req-42")
    assert caught.value.detail == "`seed` must be >= 0. Given: -1"


def test_a_lost_connection_keeps_what_arrived(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="one two three four", cut_after=2, pause_s=0.02)
    seen: list[Event] = []

    with pytest.raises(ApiError) as caught, AnswerStream(ApiClient(fake_api.url), QUESTION) as stream:
        for batch in stream.batches():
            seen += batch

    assert (caught.value.kind, caught.value.request_id) == ("lost", "req-42")
    assert text_of(seen) == "one two "


def test_an_error_event_in_the_stream_is_raised_after_the_words_before_it(fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="one two", error_event={"message": "shutting down", "code": "draining"})
    seen: list[Event] = []

    with pytest.raises(ApiError) as caught, AnswerStream(ApiClient(fake_api.url), QUESTION) as stream:
        for batch in stream.batches():
            seen += batch

    assert caught.value.kind == "draining"
    assert text_of(seen) == "one two "


def test_a_conversation_names_itself_so_that_a_router_keeps_it_together(fake_api: FakeApi) -> None:
    with AnswerStream(ApiClient(fake_api.url), QUESTION, "chat-1") as stream:
        list(stream.batches())
    read_all(fake_api.url)

    assert [received.headers.get("x-session-id") for received in fake_api.received] == ["chat-1", None]
