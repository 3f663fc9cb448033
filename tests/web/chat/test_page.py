"""The page's behaviour without a browser: Streamlit's own test driver against a fake API."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from app_driver import ask, png, shown_text
from PIL import Image
from ports import free_port
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.runtime.scriptrunner_utils.script_run_context import ScriptRunContext
from streamlit.testing.v1 import AppTest
from web_fake_api import Answer, FakeApi

from web.api_client.client import ApiClient
from web.chat.loading_notice import loading_notice
from web.i18n.strings import Texts

APP = Path(__file__).resolve().parents[3] / "web" / "app.py"

OpenPage = Callable[..., AppTest]


@pytest.fixture
def open_page(fake_api: FakeApi, own_settings: None, monkeypatch: pytest.MonkeyPatch) -> OpenPage:
    """Opens the page with the given GLM_ settings, in front of the fake API by default."""

    def open_it(query: dict[str, str] | None = None, visitor: str = "", **settings: str) -> AppTest:
        st.cache_data.clear()
        for name, value in {"GLM_API_URL": fake_api.url, **settings}.items():
            monkeypatch.setenv(name, value)
        page = AppTest.from_file(str(APP), default_timeout=60)
        for name, value in (query or {}).items():
            page.query_params[name] = value
        if visitor:
            page.session_state["visitor"] = visitor
        return page.run()

    return open_it


def test_the_empty_page_says_who_answers_and_what_it_knows(open_page: OpenPage) -> None:
    page = open_page()

    assert not page.exception
    assert "glm-shapes-demo" in shown_text(page)
    assert "It knows coloured shapes and printed words." in shown_text(page)
    assert "up to 4 pictures, 2 MB each" in shown_text(page)


def test_a_full_model_is_not_called_a_demo_model(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.info |= {"model": "zai-org/GLM-4.6V-Flash", "demo": False, "knows": None}

    page = open_page()

    assert "GLM-4.6V-Flash" in shown_text(page)
    assert "demo" not in shown_text(page)


def test_a_chinese_link_opens_a_chinese_page(open_page: OpenPage) -> None:
    page = open_page(query={"lang": "zh"})

    assert page.header[0].value == "看图问答"
    assert "它认识彩色图形和印刷文字。" in shown_text(page)
    assert "星形是什么颜色？" in [button.label for button in page.button]


def test_a_question_with_a_picture_is_sent_and_its_answer_shown(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="The circle is red.", reasoning="I look at the circle.")

    page = ask(open_page(), "What color is it?", ("mine.png", png()))

    assert not page.exception
    assert "The circle is red." in shown_text(page)
    assert "I look at the circle." in shown_text(page)
    assert "7 tokens · first word after 0.25 s · 40 tokens/s · complete" in shown_text(page)
    body = fake_api.received[0].body
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "What color is it?"
    assert body["model"] == "glm-shapes-demo"
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert "max_tokens" not in body  # the server's own limit leaves room after a thought
    assert "temperature" not in body


def test_the_place_of_the_input_box_is_never_emptied_before_it_is_filled(
    open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser that receives the two messages one after the other takes the box out, and the pictures in it are lost."""
    page, sent = open_page(), list[ForwardMsg]()
    enqueue = ScriptRunContext.enqueue
    monkeypatch.setattr(ScriptRunContext, "enqueue", lambda run, message: (sent.append(message), enqueue(run, message)))

    page.pills(key="preset").set_value("json").run()

    assert page.chat_input[0].value == "List the objects as JSON."
    kind_by_path = [(m.metadata.delta_path, m.delta.new_element.WhichOneof("type")) for m in sent]
    box = next(path for path, kind in kind_by_path if kind == "chat_input")
    assert not [path for path, kind in kind_by_path if kind == "empty" and path == box[: len(path)]]


def test_a_second_question_resends_the_picture_but_not_the_reasoning(
    open_page: OpenPage, fake_api: FakeApi
) -> None:
    fake_api.answer = Answer(text="Red.", reasoning="secret thoughts")
    page = ask(open_page(), "What color is it?", ("mine.png", png()))

    page = ask(page, "And what shape?")

    first, answer, second = fake_api.received[1].body["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert answer == {"role": "assistant", "content": "Red. "}
    assert second["content"] == [{"type": "text", "text": "And what shape?"}]
    assert "secret thoughts" not in str(fake_api.received[1].body)
    assert len(page.chat_message) == 4


def test_a_picture_without_a_question_is_described(open_page: OpenPage, fake_api: FakeApi) -> None:
    ask(open_page(), "", ("a.png", png()), ("b.png", png("blue")))

    *images, text = fake_api.received[0].body["messages"][0]["content"]
    assert len(images) == 2
    assert text["text"] == "Describe the pictures."


def test_a_click_on_a_sample_asks_about_it_and_offers_more_questions(open_page: OpenPage, fake_api: FakeApi) -> None:
    page = open_page()

    page = page.button(key="sample-shapes.png").click().run()

    image, text = fake_api.received[0].body["messages"][0]["content"]
    assert image["type"] == "image_url"
    assert text["text"] == "What color is the star?"
    assert "It is a red circle." in shown_text(page)
    page = page.button(key="more-Describe the picture.").click().run()
    assert fake_api.received[1].body["messages"][-1]["content"][0]["text"] == "Describe the picture."


def test_thinking_and_temperature_go_with_the_question(open_page: OpenPage, fake_api: FakeApi) -> None:
    page = open_page()
    page.toggle(key="thinking").set_value(False)
    page.slider(key="temperature").set_value(0.7)
    page.number_input(key="max-tokens").set_value(64)

    ask(page, "Hello")

    body = fake_api.received[0].body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["temperature"], body["max_tokens"]) == (0.7, 64)


def test_options_are_reset_to_the_model_s_defaults_each_time(open_page: OpenPage) -> None:
    page = open_page()
    for number in range(2):
        page.slider(key=f"temperature-{number}" if number else "temperature").set_value(0.7)
        page.run()

        page.button(key="reset").click().run()

        assert page.slider(key=f"temperature-{number + 1}").value == 0.0


def test_boxes_are_drawn_on_the_picture(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="[[100,200,500,600]]", boxes=[{"bbox_2d": [100, 200, 500, 600], "image": 0}])

    page = ask(open_page(), "Where is it?", ("mine.png", png()))

    assert "Marked in the picture: `[[100,200,500,600]]`" in shown_text(page)
    assert len(page.image) == 2


def test_an_answer_that_is_json_is_shown_as_code(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text='{"objects": [{"color": "red"}]}')

    page = ask(open_page(), "As JSON")

    assert '"color": "red"' in page.code[0].value


def test_a_new_chat_starts_empty(open_page: OpenPage, fake_api: FakeApi) -> None:
    page = ask(open_page(), "What color is it?", ("mine.png", png()))

    page = page.button(key="new-chat").click().run()
    ask(page, "Hello")

    assert len(fake_api.received[1].body["messages"]) == 1


def test_a_question_in_a_second_tab_shows_what_the_first_has_added(open_page: OpenPage, fake_api: FakeApi) -> None:
    first = open_page(visitor="v" * 22)
    ask(first, "What color is it?", ("mine.png", png()))
    second = open_page({"chat": first.query_params["chat"]}, visitor="v" * 22)
    assert "What color is it?" in shown_text(second)
    ask(first, "And from the first tab?")

    ask(second, "And from the second tab?", ("other.png", png("blue")))

    assert len(fake_api.received) == 2
    assert "went on in another tab" in shown_text(second) and "And from the first tab?" in shown_text(second)
    assert second.chat_input[0].value == "And from the second tab?"  # kept, and so is its picture
    ask(second, "And from the second tab?")
    assert len(fake_api.received) == 3
    reloaded = open_page({"chat": first.query_params["chat"]}, visitor="v" * 22)
    asked = [turn.question for turn in reloaded.session_state["chat"].conversation.turns]
    assert asked == ["What color is it?", "And from the first tab?", "And from the second tab?"]
    assert len(reloaded.session_state["chat"].conversation.images) == 2


def test_a_chat_that_is_too_long_can_be_retried_without_the_older_pictures(
    open_page: OpenPage, fake_api: FakeApi
) -> None:
    page = ask(open_page(), "What is it?", ("old.png", png()))
    message = "The messages have 9000 tokens; it must be < 8192."
    fake_api.answer = Answer(status=400, error={"code": "context_length_exceeded", "message": message})
    page = ask(page, "And this?", ("new.png", png("blue")))
    assert "have 9000 tokens; it must be < 8192." in page.error[0].value.replace("\\", "")

    fake_api.answer = Answer(text="Blue.")
    page = page.button(key="fewer").click().run()

    assert not page.exception
    assert "Blue." in shown_text(page)
    assert "Not sent any more." in shown_text(page)
    first, _, last = fake_api.received[2].body["messages"]
    assert [part["type"] for part in first["content"]] == ["text"]
    assert [part["type"] for part in last["content"]] == ["image_url", "text"]
    assert "fewer" not in [button.key for button in page.button]


@pytest.mark.parametrize(
    ("answer", "can_go_on"),
    [
        (Answer(text="one two three", cut_after=2), True),
        (Answer(text="one two three", finish_reason="length"), True),
        (Answer(text="one two three"), False),
        (Answer(status=500), False),
    ],
)
def test_an_answer_that_was_cut_off_can_be_continued(
    open_page: OpenPage, fake_api: FakeApi, answer: Answer, can_go_on: bool
) -> None:
    fake_api.answer = answer

    page = ask(open_page(), "Count")

    assert ("go-on" in [button.key for button in page.button]) is can_go_on


def test_boxes_outside_the_picture_are_counted_and_not_drawn(open_page: OpenPage, fake_api: FakeApi) -> None:
    boxes = [{"bbox_2d": [100, 200, 500, 1600], "normalized": False, "image": 0}]
    fake_api.answer = Answer(text="[[100,200,500,1600]]", boxes=boxes)

    page = ask(open_page(), "Where is it?", ("mine.png", png()))

    assert "1 cannot be drawn: the numbers are not within 0-1000." in shown_text(page)
    assert len(page.image) == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (Answer(status=503, error={"code": "queue_full"}), "Too many people are asking right now."),
        (Answer(status=429, error={"code": "rate_limit_exceeded"}), "All visitors of this page share one key"),
        (Answer(status=429, error={"code": "concurrency_limit_exceeded"}), "that key has reached its limit of questions."),
        (Answer(status=401, error={"code": "invalid_api_key"}), "its key is wrong or missing"),
        (Answer(status=413, error={"message": "too large"}), "too large for the model server"),
        (Answer(status=400, error={"message": "`seed` must be >= 0."}), "did not accept the question: `seed` must"),
        (Answer(status=400, error={"code": "context_length_exceeded"}), "longer than the model can read"),
        (Answer(status=500, error={}), "Something went wrong inside the model server"),
        (Answer(text="one two three", cut_after=1), "The connection broke before the answer was complete."),
    ],
)
def test_each_failure_is_one_sentence_with_the_request_id(
    open_page: OpenPage, fake_api: FakeApi, answer: Answer, sentence: str
) -> None:
    fake_api.answer = answer

    page = ask(open_page(), "Hello")

    assert not page.exception
    assert len(page.error) == 1
    assert sentence in page.error[0].value.replace("\\", "")
    assert "req-42" in page.error[0].value


def test_a_broken_answer_keeps_its_text_and_can_be_retried(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="one two three", cut_after=2, pause_s=0.02)
    page = ask(open_page(), "Count", ("mine.png", png()))
    assert "one two" in shown_text(page)

    fake_api.answer = Answer(text="All good.")
    page = page.button(key="again").click().run()

    assert "All good." in shown_text(page)
    assert len(page.chat_message) == 2
    assert fake_api.received[1].body["messages"] == fake_api.received[0].body["messages"]


def test_an_unreachable_api_is_reported_before_and_after_asking(open_page: OpenPage) -> None:
    page = open_page(GLM_API_URL=f"http://127.0.0.1:{free_port()}")
    assert "The model server does not answer right now." in page.warning[0].value

    page = ask(page, "Hello")

    assert not page.exception
    assert "The model server does not answer. Wait a moment" in page.error[0].value
    assert [link.proto.label for link in page.get("page_link")] == ["Console"]


def test_a_wrong_key_is_reported_at_once(open_page: OpenPage) -> None:
    with FakeApi(key="right") as closed:
        page = open_page(GLM_API_URL=closed.url, GLM_API_KEY="wrong")

    assert "its key is wrong or missing" in page.error[0].value
    assert "wrong" not in shown_text(page).replace("is wrong or", "")


def test_a_loading_model_is_shown_with_its_progress(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.health = {"state": "loading", "progress": 0.4}

    page = open_page()

    assert "still loading (40 %)" in page.info[0].value


@pytest.mark.parametrize(
    ("language", "changes", "shown"),
    [
        ("en", {}, "downloaded from Hugging Face (hf-mirror.com): 3.21 GB of 20.58 GB (16 %), 45.2 MB/s, about 6 min left"),
        ("zh", {}, "正在从 Hugging Face (hf-mirror.com) 下载模型：3.21 GB / 20.58 GB（16 %），45.2 MB/秒，大约还需 6 分钟"),
        ("en", {"remaining_s": 7500}, "about 2 h 5 min left"),
        ("zh", {"remaining_s": 42}, "大约还需 42 秒"),
        ("en", {"bytes_per_s": 0.0, "remaining_s": None}, "Nothing is coming at the moment"),
        ("en", {"downloaded_bytes": 0, "total_bytes": 0, "remaining_s": None}, "asks Hugging Face (hf-mirror.com) for the model's files"),
    ],
)  # fmt: skip
def test_a_download_is_shown_in_bytes_with_its_rate_and_remaining_time(language: str, changes: dict[str, Any], shown: str) -> None:
    download = {
        "hub": "Hugging Face (hf-mirror.com)", "file": "model.safetensors", "downloaded_bytes": 3_210_000_000,
        "total_bytes": 20_580_000_000, "bytes_per_s": 45_200_000.0, "remaining_s": 384.0, "trouble": "",
    }  # fmt: skip
    with FakeApi() as api:
        api.health = {"state": "loading", "progress": 0.08, "download": download | changes}
        health = ApiClient(api.url).health()

    assert shown in loading_notice(health, Texts(language)).replace("\\", "")


def test_a_download_is_shown_on_the_page(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.health = {
        "state": "loading", "progress": 0.2,
        "download": {"hub": "ModelScope (modelscope.cn)", "downloaded_bytes": 5e8, "total_bytes": 1e9, "bytes_per_s": 1e6, "remaining_s": 500},
    }  # fmt: skip

    page = open_page()

    shown = page.info[0].value.replace("\\", "")
    assert "ModelScope (modelscope.cn): 0.50 GB of 1.00 GB (50 %), 1.0 MB/s, about 8 min left" in shown


def test_a_file_that_is_not_a_picture_is_named_and_the_question_stays(open_page: OpenPage, fake_api: FakeApi) -> None:
    page = ask(open_page(), "What is it?", ("notes_*1*.png", b"not a picture"))

    assert not page.exception
    assert "is not a picture that can be read here" in page.warning[0].value
    assert page.chat_input[0].value is None or page.chat_input[0].value == "What is it?"
    assert fake_api.received == []


def test_a_picture_with_too_many_pixels_is_rejected_with_the_limit(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.info["limits"]["max_image_pixels"] = 4_000_000
    buffer = io.BytesIO()
    Image.new("1", (2500, 2000)).save(buffer, "PNG")

    page = ask(open_page(), "What is it?", ("large.png", buffer.getvalue()))

    assert "large.png has more than 4 million pixels." in page.warning[0].value.replace("\\", "")
    assert fake_api.received == []


def test_more_pictures_than_allowed_are_rejected_before_anything_is_sent(open_page: OpenPage, fake_api: FakeApi) -> None:
    page = ask(open_page(), "Compare", *[(f"{n}.png", png()) for n in range(5)])

    assert "would hold 5 pictures; 4 are allowed" in page.warning[0].value
    assert fake_api.received == []


def test_a_picture_by_link_is_offered_only_where_the_api_fetches_pictures(open_page: OpenPage, fake_api: FakeApi) -> None:
    assert "add-url" in [button.key for button in open_page().button]

    fake_api.info["limits"]["fetch_images"] = False

    assert "add-url" not in [button.key for button in open_page().button]


def test_a_tool_s_result_is_entered_and_sent_to_the_model(open_page: OpenPage, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="", call=("count_objects", '{"color": "red"}'), finish_reason="tool_calls")
    page = ask(open_page(), "How many are red?", ("mine.png", png()))
    fake_api.answer = Answer(text="There are three.")

    page.text_area(key="result-0").set_value('{"count": 3}')
    next(button for button in page.button if button.label == "Send to the model").click()
    page.run()

    assert not page.exception
    assert "There are three." in shown_text(page)
    assert "Result of count" in shown_text(page)
    question, call, result = fake_api.received[1].body["messages"]
    assert [part["type"] for part in question["content"]] == ["image_url", "text"]
    assert call["tool_calls"][0]["function"] == {"name": "count_objects", "arguments": '{"color": "red"}'}
    assert result == {"role": "tool", "tool_call_id": "call-7", "content": '{"count": 3}'}
