"""Chat completions that fail: each ends once, with an error in OpenAI's format, and releases its permit."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jinja2 import TemplateError
from served import KEY, chat_body, image_part, sse_data, text_part, wait_for

from api import errors
from api.behind import engine_client
from api.caller import Caller
from api.engine.request import Failure

WAIT_S = 30.0


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_wrong_model_is_named(serve) -> None:
    error = error_of(serve().chat(model="gpt-5"), 404)

    assert error["param"] == "model" and "'gpt-5'" in error["message"] and "'fake'" in error["message"]


def test_the_right_model_is_accepted(serve) -> None:
    assert serve().chat(model="fake").status_code == 200


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(serve) -> None:
    error = error_of(serve(context_tokens=100).chat("x" * 200), 400)

    assert error["code"] == "context_length_exceeded"
    assert "205 tokens" in error["message"] and "100" in error["message"]


def test_a_text_far_longer_than_the_context_is_refused_before_it_is_tokenized(serve) -> None:
    served = serve(context_tokens=100)
    encoded = []
    served.model.vocabulary.encode = encoded.append

    error = error_of(served.chat("x" * 1_000_000), 400)

    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages") and encoded == []
    assert "100000" in error["message"] and "100 tokens" in error["message"]


def test_images_longer_than_the_context_are_refused_before_they_are_decoded(serve) -> None:
    served = serve(context_tokens=100)
    processed = []
    served.model.image_processor.process = processed.append

    error = error_of(served.chat([image_part(size=(560, 560)), text_part("q")]), 400)

    assert error["code"] == "context_length_exceeded" and "400 tokens" in error["message"]
    assert processed == []


def test_too_many_images_are_refused(serve) -> None:
    error = error_of(serve(max_images=2).chat([image_part()] * 3), 400)

    assert error["message"] == "`messages` must have <= 2 pictures. Given: 3"


def test_a_body_that_is_too_large_is_refused(serve) -> None:
    error = error_of(serve(max_body_bytes=1000).chat("x" * 2000), 413)

    assert error["code"] == "body_too_large" and "<= 1000 bytes" in error["message"]


def test_a_body_of_unknown_length_is_cut_off_while_it_is_read(serve) -> None:
    sent = []

    def body() -> Iterator[bytes]:
        for _ in range(50):
            sent.append(1)
            yield b"x" * 100

    response = serve(max_body_bytes=1000).client.post("/v1/chat/completions", content=body())

    assert error_of(response, 413)["code"] == "body_too_large"


def test_an_empty_body_is_refused(serve) -> None:
    assert error_of(serve().client.post("/v1/chat/completions"), 400)["code"] == "invalid_json"


def test_a_full_queue_answers_503_with_retry_after_and_recovers(serve) -> None:
    served = serve(queue_size=1)
    asking = [threading.Thread(target=served.chat, args=(text,)) for text in ("HANG", "wait")]
    asking[0].start()
    assert served.runner.hanging.wait(WAIT_S)
    asking[1].start()
    wait_for(lambda: served.engine.stats().waiting == 1)

    refused = served.chat("one more")

    assert error_of(refused, 503)["code"] == "queue_full" and int(refused.headers["Retry-After"]) > 0
    served.runner.release.set()
    for thread in asking:
        thread.join(WAIT_S)
    assert served.chat("again").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_refused_requests_release_their_permit(stream: bool, serve) -> None:
    served = serve(queue_size=1)

    for _ in range(5):
        assert served.chat(stream=stream, temperature=-1).status_code == 400
        assert served.chat("FAIL", stream=stream).status_code == (200 if stream else 500)

    assert served.chat().status_code == 200
    assert served.app.state.server.admission.active == 0


def test_a_failing_engine_is_an_error_body(serve) -> None:
    error = error_of(serve().chat("FAIL"), 500)

    assert error["code"] == "engine_error" and "told to fail" not in error["message"]


def test_a_failing_engine_is_an_error_event_in_a_stream(serve) -> None:
    events = serve().stream("FAIL")

    assert events[-1]["error"]["code"] == "engine_error"
    assert "[DONE]" not in events


def test_a_dying_engine_is_an_error_and_later_503(serve) -> None:
    served = serve()

    assert error_of(served.chat("CRASH"), 503)["code"] == "dead"
    assert error_of(served.chat("hello"), 503)["code"] == "dead"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_past_its_deadline_ends_with_an_error(stream: bool, serve) -> None:
    served = serve(request_timeout_s=0.2, token_s=0.02)

    answer = served.chat("x" * 500, stream=stream)

    error = sse_data(answer.text)[-1]["error"] if stream else error_of(answer, 504)
    assert error["code"] == "deadline"
    wait_for(lambda: served.engine.stats().running == 0)
    assert served.app.state.server.admission.active == 0


def test_too_many_choices_for_the_queue_are_refused_together(serve) -> None:
    served = serve(queue_size=2)

    assert error_of(served.chat(n=8), 503)["code"] == "queue_full"
    assert served.engine.stats().waiting == served.app.state.server.admission.active == 0


def test_a_prompt_with_too_many_tokens_for_the_queue_is_refused(serve) -> None:
    served = serve(queue_tokens=100)
    permit = served.app.state.server.admission.admit(Caller("ann"))
    permit.take_tokens(90)

    error = error_of(served.chat("x" * 50), 503)
    permit.release()

    assert "<= 100 tokens may be under way, 90 are" in error["message"]
    assert served.chat("x" * 50).status_code == 200


def test_a_schema_that_cannot_be_enforced_is_refused_by_name(serve) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}

    error = error_of(serve().chat(response_format=response_format), 400)

    assert (error["param"], error["code"]) == ("response_format", "unsupported_schema")


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_fails_while_the_model_writes_is_its_senders_error(serve, stream: bool) -> None:
    wide = {"type": "object", "properties": {f"q{n}": {"type": "string"} for n in range(1000)}}
    schema = {"type": "array", "items": {**wide, "additionalProperties": False}}
    served = serve(answer=lambda prompt, index: "[{")

    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = served.chat(response_format=response_format, stream=stream)

    error = next(item["error"] for item in sse_data(answer.text) if "error" in item) if stream else error_of(answer, 400)
    assert error["code"] == "unsupported_schema" and "max is 2000" in error["message"]
    assert served.client.get("/health").json()["outcomes"]["failed"] == {"grammar": 1}


def test_a_schema_that_takes_too_long_is_refused(serve, monkeypatch) -> None:
    monkeypatch.setattr("api.requests.sampling_params.COMPILE_S", 0.05)
    monkeypatch.setattr("api.requests.sampling_params._compile_all", lambda *_: time.sleep(0.5))

    error = error_of(serve().chat(response_format={"type": "json_object"}), 400)

    assert (error["param"], error["code"]) == ("response_format", "schema_too_complex")


def test_a_bias_of_a_token_that_does_not_exist_is_refused(serve) -> None:
    assert error_of(serve().chat(logit_bias={"99999": 1}), 400)["param"] == "logit_bias"


def test_a_template_that_refuses_the_messages_is_quoted(serve) -> None:
    served = serve()

    def refuse(*args: object) -> str:
        raise TemplateError("Roles must alternate.")

    served.model.template.render = refuse

    error = error_of(served.chat(), 400)
    assert error["param"] == "messages" and "Roles must alternate." in error["message"]


def test_a_body_that_never_arrives_times_out(serve, monkeypatch) -> None:
    monkeypatch.setattr("api.http.connection.BODY_S", 0.05)
    served = serve()

    async def ask() -> int:
        sent = []

        async def receive() -> dict:
            if not sent:
                sent.append(1)
                return {"type": "http.request", "body": b"{", "more_body": True}
            await asyncio.Event().wait()
            raise AssertionError

        statuses = []

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers,
                 "query_string": b"", "raw_path": b"", "root_path": "", "scheme": "http"}  # fmt: skip
        await served.app(scope, receive, send)
        return statuses[0]

    assert asyncio.run(ask()) == 408
    assert served.app.state.server.admission.active == 0


def test_an_internal_error_is_a_500_without_details(serve) -> None:
    served = serve()

    def broken(*args: object) -> str:
        raise RuntimeError("private detail")

    served.model.template.render = broken
    response = served.chat()

    assert error_of(response, 500)["code"] == "internal_error"
    assert "private detail" not in response.text and response.headers["x-request-id"]


def test_an_internal_error_in_a_stream_is_an_error_event(serve, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("private detail")

    monkeypatch.setattr("api.protocol.completion.Completion.feed", broken)
    events = serve().stream()

    assert events[-1]["error"]["code"] == "internal_error" and "private" not in str(events)


def test_a_drain_past_its_deadline_is_an_error_event(serve) -> None:
    served = serve()
    texts: list[str] = []
    body = chat_body("HANG", stream=True)
    asking = threading.Thread(target=lambda: texts.append(served.client.post("/v1/chat/completions", json=body).text))
    asking.start()
    assert served.runner.hanging.wait(WAIT_S)

    served.engine.drain(0.01)
    asking.join(WAIT_S)

    assert sse_data(texts[0])[-1]["error"]["code"] == "draining"


def test_a_waiting_stream_reports_its_position_in_the_queue(serve, monkeypatch) -> None:
    monkeypatch.setattr("api.requests.handler.COMMENT_S", 0.01)
    served = serve()
    blocker = threading.Thread(target=served.chat, args=("HANG",))
    blocker.start()
    assert served.runner.hanging.wait(WAIT_S)
    positions: list[int | None] = []
    position = served.engine.position
    monkeypatch.setattr(served.engine, "position", lambda name: positions.append(position(name)) or positions[-1])
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.append(served.chat("hi", stream=True).text))
    asking.start()
    wait_for(lambda: len(positions) > 2)
    served.runner.release.set()
    for thread in (blocker, asking):
        thread.join(WAIT_S)

    assert ": queue_position=1\n" in texts[0]
    assert sse_data(texts[0])[-1] == "[DONE]"


def test_the_documentation_lists_every_refusal_with_its_status_and_when_to_retry() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text(encoding="utf-8").split("\n## Errors")[1].split("\n## ")[0]
    listed = {
        (int(status), code): retry
        for status, codes, retry in re.findall(r"^\| (503|429) (.+?) \|.+?\| (.+?) \|", page, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    made = [
        *(errors.not_accepting(state, 0.5, None) for state in ("loading", "draining", "stalled", "dead")),
        *(errors.failed(kind, "") for kind in Failure),
        errors.queue_full(1), errors.too_many_tokens(1, 1, 1), errors.too_many_image_bytes(1, 1), errors.too_many_bytes(1),
        errors.too_many_bytes_of_key(1), errors.too_many_in_a_minute(1, 59.5), errors.too_many_at_once(1),
        engine_client.unreachable(""), engine_client.error_of({}, 503), engine_client.error_of({"error": {"param": "model"}}, 404),
    ]  # fmt: skip
    refusals = [error for error in made if error.status in (429, 503)]

    assert {(error.status, error.code) for error in refusals} == set(listed)
    for error in refusals:
        assert str(error.retry_after_s) in re.findall(r"\d+", listed[error.status, error.code]) or error.status == 429


def test_those_who_are_refused_together_do_not_come_back_together() -> None:
    full, of_key = errors.too_many_tokens(1, 1, 1), errors.too_many_in_a_minute(1, 30.0)
    assert {int(full.headers()["Retry-After"]) for _ in range(300)} == set(range(5, 11))
    assert {of_key.headers()["Retry-After"] for _ in range(50)} == {"30"}, "a key's limit ends when it ends"
