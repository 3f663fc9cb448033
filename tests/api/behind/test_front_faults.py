"""What comes of an engine that refuses, breaks off, hangs or is not there, and of clients that leave."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from typing import Any

import httpx
import pytest
from engine_stand_in import USAGE, chunk, deltas, engine
from PIL import Image
from ports import free_port
from served import KEY, chat_body, image_part, sse_data, text_part, wait_for
from server_process import HEADERS, Server

from settings import Settings


def ask(front: Any, content: Any = "hi", path: str = "/v1/chat/completions", **fields: Any) -> Any:
    return front.client.post(path, json=chat_body(content, **fields))


@pytest.mark.parametrize(
    ("kind", "context", "slots"), [("vllm", 2048, 256), ("sglang", 4096, 256), ("llama.cpp", 1024, 3), ("other", 32768, 256)]
)
def test_the_kind_and_the_limits_are_read_from_the_engine(kind, context, slots, front) -> None:
    with engine(kind) as behind:
        made = front(behind)
        models, info = made.client.get("/v1/models").json(), made.client.get("/info").json()

        assert (models["data"][0]["id"], models["data"][0]["max_model_len"]) == ("some-model", context)
        assert info["engine"]["kind"] == kind and info["context_tokens"] == context and made.engine.slots() == slots
        health = made.health()
        assert health["state"] == "idle" and health["engine"] == {**health["engine"], "kind": kind, "url": behind.url, "reason": None}
        assert made.client.get("/metrics").status_code == 200


def test_a_kind_that_is_given_is_not_guessed(front) -> None:
    with engine("vllm") as behind:
        assert front(behind, engine_kind="llama.cpp").engine.model.kind == "llama.cpp"


def test_thoughts_and_calls_that_the_engine_has_separated_are_taken(front) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at":'}}
    rest = {"index": 0, "function": {"arguments": ' "it"}'}}
    with engine() as behind:
        behind.behave = deltas({"reasoning": "Hm"}, {"reasoning": "m."}, {"content": "Well."}, {"tool_calls": [call]}, {"tool_calls": [rest]}, reason="tool_calls")
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
        choice = ask(front(behind), tools=tools).json()["choices"][0]

    assert choice["finish_reason"] == "tool_calls" and choice["message"]["reasoning_content"] == "Hmm."
    assert choice["message"]["content"] == "Well."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "it"}'}


def test_thoughts_and_calls_that_the_engine_leaves_in_the_text_are_separated(front) -> None:
    with engine() as behind:
        behind.behave = deltas(
            {"content": "<think>Hm"}, {"content": "m.</think>It is <|begin_of"}, {"content": "_box|>[[1, 2, 300, 400]]<|end_of_box|>."},
            {"content": "<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>it</arg_value>\n</tool_call>"},
        )  # fmt: skip
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}]
        message = ask(front(behind), [image_part(), text_part("Where?")], tools=tools).json()["choices"][0]["message"]

    assert message["reasoning"] == "Hmm." and message["content"] == "It is [[1, 2, 300, 400]]."
    assert message["boxes"][0]["bbox_2d"] == [1, 2, 300, 400]
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "it"}'}


def test_separators_of_lines_inside_of_a_text_end_no_event(front) -> None:
    with engine() as behind:
        behind.behave = deltas({"content": "a\u2028b\x85c"})
        assert ask(front(behind)).json()["choices"][0]["message"]["content"] == "a\u2028b\x85c"


def test_the_key_of_the_engine_is_sent_and_that_of_the_caller_is_not(front) -> None:
    with engine() as behind:
        ask(front(behind, engine_key="sk-of-the-engine"))
        assert behind.keys == ["Bearer sk-of-the-engine"]


def test_pictures_are_decoded_here_and_sent_on_in_a_format_that_every_engine_reads(front) -> None:
    def part(image: Image.Image, kind: str, **options: Any) -> dict[str, Any]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}}

    turned = Image.Exif()
    turned[0x0112] = 6
    plain = part(Image.new("RGB", (60, 40), "red"), "PNG")
    given = [plain, part(Image.new("RGB", (60, 40), "red"), "WEBP"), part(Image.new("RGB", (60, 40), "red"), "JPEG", exif=turned)]
    with engine() as behind:
        assert ask(front(behind), [*given, text_part("What?")]).status_code == 200
        sent = [p["image_url"]["url"] for p in behind.asked[0][1]["messages"][0]["content"][:3]]

    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in sent]
    assert sent[0] == plain["image_url"]["url"], "what every engine reads alike is sent as it came"
    assert [(image.format, image.size) for image in images] == [("PNG", (60, 40)), ("PNG", (60, 40)), ("PNG", (40, 60))]


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_no_address_of_a_caller_reaches_the_engine(url, front) -> None:
    with engine() as behind:
        answer = ask(front(behind, fetch_images=True), [{"type": "image_url", "image_url": {"url": url}}, text_part("What?")])

        assert answer.status_code == 400 and answer.json()["error"]["param"].endswith("image_url.url")
        assert not behind.asked


REFUSALS = [
    (400, {"error": {"message": "This model's maximum context length is 2048 tokens.", "code": 400}}, 400, "context_length_exceeded"),
    (400, {"error": {"message": "bad", "type": "BadRequestError", "param": "top_p", "code": 400}}, 400, "invalid_value"),
    (422, {"detail": "x"}, 400, "invalid_value"),
    (401, {"error": "Unauthorized"}, 500, "engine_unauthorized"),
    (404, {"error": {"message": "The model `x` does not exist.", "code": 404}}, 503, "engine_model_changed"),
    (429, {"object": "error", "message": "slow down"}, 503, "queue_full"),
    (500, {"error": {"message": "EngineCore died", "code": 500}}, 500, "engine_error"),
    (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, 503, "engine_unavailable"),
    (504, {}, 504, "deadline"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "body", "ours", "code"), REFUSALS)
def test_refusals_of_the_engine_become_errors_of_this_api(stream, status, body, ours, code, front) -> None:
    with engine() as behind:
        behind.behave = lambda handler, _: handler.reply(status, body, retry_after="7")
        answer = ask(front(behind), stream=stream)

    assert (answer.status_code, answer.json()["error"]["code"]) == (ours, code), answer.text
    if status == 429:
        assert 7 <= int(answer.headers["retry-after"]) <= 14  # spread, as every 503 is


def test_an_error_in_the_stream_is_told_as_one(front) -> None:
    def behave(handler, body) -> None:
        handler.open_stream()
        handler.send(chunk({"content": "half"}))
        handler.send({"error": {"message": "EngineCore died", "code": 500}})
        handler.send(b"[DONE]")

    with engine() as behind:
        behind.behave = behave
        made = front(behind)
        events, whole = sse_data(ask(made, stream=True).text), ask(made)

    assert events[-1]["error"]["code"] == "engine_error" and "[DONE]" not in events
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_error")


@pytest.mark.parametrize("done", [False, True])
def test_a_stream_that_is_cut_off_is_no_answer(done, front) -> None:
    def behave(handler, body) -> None:
        handler.open_stream()
        handler.send(chunk({"content": "half"}))
        if done:  # without a reason for its end
            handler.send(b"[DONE]")

    with engine() as behind:
        behind.behave = behave
        made = front(behind)
        events, whole = sse_data(ask(made, stream=True).text), ask(made)
        anthropic = made.client.post("/v1/messages", json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "stream": True}).text

    assert events[-1]["error"]["code"] == "engine_cut_off"
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_cut_off")
    assert anthropic.rstrip().splitlines()[-2] == "event: error" and "message_stop" not in anthropic


def test_an_engine_that_goes_away_before_the_first_token_may_be_asked_again(front) -> None:
    def behave(handler, body) -> None:
        handler.open_stream()
        handler.send(chunk({"role": "assistant", "content": ""}))

    with engine() as behind:
        behind.behave = behave
        answer = ask(front(behind))

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unreachable")


def test_an_engine_that_is_not_there_yet_is_waited_for(front) -> None:
    port = free_port()
    made = front(f"http://127.0.0.1:{port}/v1", ready=False)
    wait_for(lambda: "attempt" in made.health()["reason"] or "refused" in made.health()["reason"])

    answer = ask(made)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert made.client.get("/readyz").status_code == 503 and made.client.get("/livez").status_code == 200
    with engine("vllm", port) as behind:
        behind.health, behind.health_body = 503, {"error": {"message": "Loading model", "code": 503}}
        wait_for(lambda: "Loading model" in made.health()["reason"])
        behind.health = 200
        wait_for(lambda: made.health()["state"] == "idle")
        assert ask(made).status_code == 200
    wait_for(lambda: made.health()["state"] == "loading")
    assert ask(made).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_accepts_a_question_and_sends_nothing_misses_the_deadline(stream, front) -> None:
    asked = threading.Event()

    def behave(handler: Any, body: Any) -> None:
        asked.set()
        ended.wait(10)

    ended = threading.Event()
    with engine() as behind:
        behind.behave = behave
        made = front(behind, request_timeout_s=0.3)
        answer = ask(made, stream=stream)
        ended.set()

        assert asked.is_set()
        # vLLM and its like accept a streamed question before they compute it, and the error is then an event.
        error = sse_data(answer.text)[-1]["error"] if answer.status_code == 200 else answer.json()["error"]
        assert error["code"] == "deadline" and "0.3 s" in error["message"], answer.text


@pytest.mark.parametrize("delta", [{"content": 42}, {"content": ["a"]}, [1], "a"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_no_text_is_none(delta, stream, front) -> None:
    with engine() as behind:
        behind.behave = deltas({"content": "A"}, delta)
        answer = ask(front(behind), stream=stream)

    error = sse_data(answer.text)[-1]["error"] if stream else answer.json()["error"]
    assert error["code"] == "engine_cut_off", answer.text


def test_a_choice_that_was_not_asked_for_is_not_the_answer(front) -> None:
    def behave(handler: Any, body: Any) -> None:
        handler.open_stream()
        for index, text in ((1, "Wrong."), (0, "Right.")):
            handler.send(chunk({"content": text}, choice={"index": index}))
            handler.send(chunk({}, "stop", choice={"index": index}))
        handler.send(b"[DONE]")

    with engine() as behind:
        behind.behave = behave
        assert ask(front(behind)).json()["choices"][0]["message"]["content"] == "Right."


@pytest.mark.parametrize(
    ("pieces", "text"), [(["a\ud83d", "\ude00b"], "a\U0001f600b"), (["a\ud83d", "b"], "a\ufffdb"), (["a\ud83d"], "a\ufffd"), (["\ude00"], "\ufffd")]
)
def test_characters_that_arrive_in_two_halves_are_put_together(pieces, text, front) -> None:
    def behave(handler: Any, body: Any) -> None:
        handler.open_stream()
        for piece in pieces:
            handler.send(json.dumps(chunk({"content": piece})).encode())
        handler.send(chunk({}, "stop", usage=USAGE))
        handler.send(b"[DONE]")

    with engine() as behind:
        behind.behave = behave
        assert ask(front(behind)).json()["choices"][0]["message"]["content"] == text


def test_arguments_of_a_call_that_are_an_object_become_text(front) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    with engine() as behind:
        behind.behave = deltas({"tool_calls": [call]}, reason="tool_calls")
        [made] = ask(front(behind), tools=tools).json()["choices"][0]["message"]["tool_calls"]

    assert made["function"] == {"name": "look", "arguments": '{"at": "it"}'}


def test_an_event_may_have_several_lines(front) -> None:
    def behave(handler: Any, body: Any) -> None:
        handler.open_stream()
        handler.wfile.write(b"event: message\r\ndata: " + json.dumps(chunk({"content": "Yes."}), indent=1).replace("\n", "\r\ndata: ").encode() + b"\r\n\r\n")
        handler.send(chunk({}, "stop"))
        handler.send(b"[DONE]")

    with engine() as behind:
        behind.behave = behave
        assert ask(front(behind)).json()["choices"][0]["message"]["content"] == "Yes."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "kind", "code", "says"), [(302, "text/html", (500, "engine_error"), "redirect"), (200, "text/html", (503, "engine_unreachable"), "text/html")])
def test_an_address_that_is_not_the_engines_is_the_operators_fault(stream, status, kind, code, says, front) -> None:
    with engine() as behind:
        behind.behave = lambda handler, _: handler.reply(status, {"login": True}, content_type=kind, location="http://127.0.0.1/login")
        answer = ask(front(behind), stream=stream)

    assert (answer.status_code, answer.json()["error"]["code"]) == code, answer.text
    assert says in answer.json()["error"]["message"] and "/login" not in answer.text


def test_a_field_that_the_engine_does_not_honour_is_refused_before_it_is_asked(front) -> None:
    with engine("llama.cpp") as behind:
        answer = ask(front(behind), stop_token_ids=[3])

        assert answer.json()["error"]["param"] == "stop_token_ids" and answer.status_code == 400 and not behind.asked


def test_tokens_are_counted_by_an_engine_without_a_tokenizer(front) -> None:
    with engine("other") as behind:
        made = front(behind)
        counted = made.client.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": "hi"}]})
        refused = made.client.post("/tokenize", json={"prompt": "hi"})

        assert counted.json() == {"input_tokens": USAGE["prompt_tokens"]} and behind.asked[0][1]["max_tokens"] == 1
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "unsupported_by_engine"


def test_an_engine_that_stands_still_is_stalled_and_the_process_in_front_of_it_is_alive(front) -> None:
    released = threading.Event()

    def behave(handler, body) -> None:
        handler.open_stream()
        handler.send(chunk({"content": "half"}))
        released.wait(30)

    with engine() as behind:
        behind.behave = behave
        made = front(behind, stall_s=1.0)
        asking = threading.Thread(target=lambda: ask(made))
        asking.start()
        wait_for(lambda: made.health()["state"] == "stalled")
        assert made.health()["engine"]["unanswered_s"] >= 0.9
        assert made.client.get("/livez").status_code == 200 and made.client.get("/readyz").status_code == 503
        released.set()
        asking.join(30)
        wait_for(lambda: made.health()["state"] == "idle")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_closes_the_connection_to_the_engine(stream, tmp_path) -> None:
    left: list[float] = []

    def behave(handler, body) -> None:
        handler.open_stream()
        try:
            while True:
                handler.send(chunk({"content": "and "}))
                time.sleep(0.02)
        except OSError:
            left.append(time.monotonic())

    with engine() as behind:
        behind.behave = behave
        command = [__import__("sys").executable, "-m", "api.server"]
        server = Server(free_port(), tmp_path / "api.log", command, GLM_ENGINE_URL=behind.url, GLM_LOG_DIR=str(tmp_path / "logs"))
        try:
            server.until(lambda health: health["state"] == "idle")
            with pytest.raises(httpx.ReadTimeout):
                if stream:
                    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=chat_body(stream=True), headers=HEADERS, timeout=30) as answer:
                        next(answer.iter_bytes())
                        raise httpx.ReadTimeout("leaves")
                else:
                    server.post(chat_body(), timeout=0.7)
            gone_at = time.monotonic()
            wait_for(lambda: bool(left))
            assert left[0] - gone_at < 1.0
            server.until(lambda health: health["state"] == "idle")
        finally:
            server.process.kill()
            server.process.wait(30)


def test_running_answers_end_before_the_server_does(front) -> None:
    with engine() as behind:
        made = front(behind)
        assert made.engine.drain(1.0)
        answer = ask(made)

        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_settings_name_what_is_missing(tmp_path) -> None:
    with pytest.raises(ValueError, match="GLM_ENGINE_COMMAND needs GLM_ENGINE_URL"):
        Settings(engine_command="run")
    assert Settings(engine_url="http://host:8000/v1/", api_key=KEY).engine_base_url == "http://host:8000"
