"""The page in a real Chromium: what only a browser can show, and real answers of the demo model.

The vision path cannot be faked: the same question about two images that differ only in colour gets two different
correct answers, and a blank image neither.
"""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from browsing import KEY, TOKEN, add_image, ask, last_answer, png, wait_for_the_run
from page_process import OpenPage, Server, wait_until
from playwright.sync_api import Page, expect
from web_fake_api import HEALTH, INFO, Answer, FakeApi

from models.shapes.pictures import COLORS
from models.shapes.talk import COUNT_TOOL
from web.api_client.client import ApiClient
from web.console import api_metrics

SEED = 90210  # of positions and sizes


@pytest.fixture
def demo_page(real_page_server: Server, open_page: OpenPage) -> Page:
    return open_page(real_page_server)


def colors_in(answer: str) -> set[str]:
    return set(re.findall(rf"\b({'|'.join(COLORS)})\b", answer.lower()))


def ask_in_a_new_chat(page: Page, name: str, image: bytes, question: str) -> str:
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(0)
    add_image(page, name, image)
    ask(page, question)
    return last_answer(page)


def test_the_demo_model_answers_from_the_pictures(demo_page: Page) -> None:
    question = "What color is the circle?"
    expect(demo_page.get_by_test_id("stMarkdown").first).to_contain_text("demo")

    red = ask_in_a_new_chat(demo_page, "one.png", png(("red", "circle"), seed=SEED), question)
    blue = ask_in_a_new_chat(demo_page, "two.png", png(("blue", "circle"), seed=SEED), question)
    blank = ask_in_a_new_chat(demo_page, "three.png", png(seed=SEED), question)

    assert (colors_in(red), colors_in(blue), colors_in(blank)) == ({"red"}, {"blue"}, set()), (red, blue, blank)


def test_a_second_question_is_answered_about_the_same_picture(demo_page: Page) -> None:
    first = ask_in_a_new_chat(demo_page, "mine.png", png(("green", "star"), seed=SEED), "What color is the star?")

    ask(demo_page, "How many shapes are there?")
    expect(demo_page.get_by_test_id("stChatMessage")).to_have_count(4)
    second = last_answer(demo_page)

    assert colors_in(first) == {"green"}, first
    assert re.findall(r"There (?:is|are) (\w+)", second) == ["1"], second


def test_the_place_of_an_object_is_drawn_on_the_picture(demo_page: Page) -> None:
    demo_page.get_by_role("button", name="Where is the heart?").click()
    drawn = demo_page.get_by_role("img", name="Where it is, drawn on")
    expect(drawn).to_be_visible()
    demo_page.get_by_text("1 marked in").click()

    row = demo_page.get_by_test_id("stMarkdown").get_by_role("row").last
    expect(row).to_be_visible()
    x1, y1, x2, y2 = (int(number) for number in row.get_by_role("cell").last.inner_text().split(", "))
    assert 600 < x1 < x2 < 1000, row.inner_text()  # the heart is at the right
    assert y1 < y2


def test_json_by_schema_is_right_and_fits(demo_page: Page) -> None:
    add_image(demo_page, "one.png", png(("red", "circle"), seed=SEED))
    demo_page.get_by_text("JSON by schema").click()
    area = demo_page.get_by_test_id("stChatInputTextArea")
    expect(area).to_have_value("List the objects as JSON.")
    wait_for_the_run(demo_page)
    area.press("Enter")

    expect(demo_page.get_by_text("Valid JSON that fits the schema")).to_be_visible()
    answer = demo_page.get_by_test_id("stCode").first.inner_text()
    assert json.loads(answer) == {"objects": [{"color": "red", "shape": "circle"}]}


def test_the_demo_model_calls_a_tool_and_uses_its_result(demo_page: Page, real_api: Server) -> None:
    add_image(demo_page, "three.png", png(("red", "circle"), ("red", "circle"), ("blue", "star"), seed=SEED))
    demo_page.get_by_text("JSON and tools").click()
    tools = demo_page.get_by_role("textbox", name="Tools, as JSON")
    tools.fill(json.dumps([COUNT_TOOL]))
    tools.blur()
    ask(demo_page, "Use the tool to count the red circles.")

    call = demo_page.get_by_test_id("stChatMessage").last
    expect(call).to_contain_text("asked for a tool")
    expect(call).to_contain_text("Asks for the tool count_objects")
    assert json.loads(call.get_by_test_id("stCode").inner_text()) == {"color": "red", "shape": "circle"}
    result = demo_page.get_by_label("Result of the tool count_objects")
    result.fill("7")
    demo_page.get_by_role("button", name="Send to the model").click()

    expect(demo_page.get_by_test_id("stChatMessage")).to_have_count(4)
    assert re.search(r"\b(7|seven)\b", last_answer(demo_page)), "the tool's result, not what the picture shows"


def test_stop_while_queued_in_the_real_engine_leaves_the_queue(demo_page: Page, real_api: Server) -> None:
    api = ApiClient(real_api.url, KEY)
    endless = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3000, "ignore_eos": True}
    with ExitStack() as holders:
        for _ in range(2):
            holders.enter_context(closing(api.post_stream({**endless, "stream": True})))
        wait_until(lambda: api.health_body()["running"] == 2, "both slots to be taken", 30)
        ask(demo_page, "Hello")
        waiting = demo_page.get_by_text("Waiting in line, place 1")
        expect(waiting).to_be_visible()
        assert (api.health_body()["running"], api.health_body()["waiting"]) == (2, 1)

        stopped_at = time.monotonic()
        demo_page.get_by_role("button", name="Stop", exact=True).click()
        wait_until(lambda: api.health_body()["waiting"] == 0, "the line to be empty", 10)
        left_after_s = time.monotonic() - stopped_at
        expect(demo_page.get_by_text("Stopped before the answer began.")).to_be_visible()
        expect(demo_page.get_by_test_id("stChatInputTextArea")).to_be_enabled()
        assert api.health_body()["running"] == 2, "the running requests continue"

    assert left_after_s < 2
    wait_until(lambda: api.health_body()["running"] == 0, "the slots to be free again", 30)
    demo_page.get_by_role("button", name="Try again").click()
    assert last_answer(demo_page)


def test_the_fake_api_has_the_fields_of_the_real_one(real_api: Server) -> None:
    api = ApiClient(real_api.url, KEY)
    info, health = api.info_body(), api.health_body()

    assert set(INFO) <= set(info)
    assert set(INFO["limits"]) <= set(info["limits"])
    assert set(INFO["generation"]) <= set(info["generation"])
    assert set(HEALTH) <= set(health)
    assert api_metrics.parse(api.metrics_text()).kv_used is not None


def test_stop_keeps_what_was_written_and_ends_the_request(fake_page: Page, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="word " * 2000, pause_s=0.05)
    ask(fake_page, "Tell me everything")
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word word word")

    fake_page.get_by_role("button", name="Stop", exact=True).click()
    stopped_at = time.monotonic()
    wait_until(lambda: fake_api.received[0].left_at, "the API to see the disconnect", 30)

    assert (fake_api.received[0].left_at or 0) - stopped_at < 2
    message = fake_page.get_by_test_id("stChatMessage").last
    expect(message).to_contain_text("Stopped. What had been written is kept.")
    expect(message).to_contain_text("word word word")
    expect(fake_page.get_by_role("button", name="Try again")).to_be_visible()


# Presses Stop when the page is about to send its next timed request, sends that while the run that draws the stopped
# answer goes on, and keeps the browser busy meanwhile: it then receives the ends of both runs at once.
STOP_WITH_A_TIMED_REQUEST = """laterMs => {
    const send = WebSocket.prototype.send;
    const stayBusy = ms => { for (const end = Date.now() + ms; Date.now() < end;); };
    WebSocket.prototype.send = function (data) {
        WebSocket.prototype.send = send;
        [...document.querySelectorAll('button')].find(button => button.innerText.trim().endsWith('Stop')).click();
        stayBusy(laterMs);
        send.call(this, data);
        stayBusy(3000);
        window.wasBusy = true;
    };
}"""


@pytest.mark.parametrize("later_ms", [30, 60])
def test_the_input_box_unlocks_when_a_timed_request_comes_with_stop(
    fake_page: Page, fake_api: FakeApi, later_ms: int
) -> None:
    fake_api.answer = Answer(text="word " * 2000, pause_s=0.05)
    ask(fake_page, "Tell me everything")
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word word word")

    fake_page.evaluate(STOP_WITH_A_TIMED_REQUEST, later_ms)
    fake_page.wait_for_function("window.wasBusy")

    expect(fake_page.get_by_text("Stopped. What had been written is kept.")).to_be_visible()
    fake_api.answer = Answer(text="Second.")
    ask(fake_page, "And again")
    assert "Second." in last_answer(fake_page)


def test_stop_while_queued_ends_the_request(fake_page: Page, fake_api: FakeApi) -> None:
    ask(fake_page, "Hello")
    last_answer(fake_page)
    fake_api.answer = Answer(queue=500, queue_pause_s=1)
    ask(fake_page, "Hello again")
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("Waiting in line")

    fake_page.get_by_test_id("stChatInputStopButton").click()
    stopped_at = time.monotonic()
    wait_until(lambda: fake_api.received[1].left_at, "the API to see the disconnect", 30)

    assert (fake_api.received[1].left_at or 0) - stopped_at < 2
    expect(fake_page.get_by_text("Stopped before the answer began.")).to_be_visible()


def test_an_answer_about_a_sample_can_be_stopped_too(fake_page: Page, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="word " * 2000, pause_s=0.05)
    fake_page.get_by_role("button", name="What color is the star?").click()
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word word")

    fake_page.get_by_role("button", name="Stop", exact=True).click()
    stopped_at = time.monotonic()
    wait_until(lambda: fake_api.received[0].left_at, "the API to see the disconnect", 30)

    assert (fake_api.received[0].left_at or 0) - stopped_at < 2
    expect(fake_page.get_by_text("Stopped. What had been written is kept.")).to_be_visible()


def test_changing_settings_or_language_does_not_interrupt_an_answer(
    fake_page: Page, fake_api: FakeApi
) -> None:
    changed = threading.Event()
    fake_api.answer = Answer(text="word", pause_s=0.05, repeat_until=changed, ending="the end")
    ask(fake_page, "Tell me everything")
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word word")

    fake_page.get_by_text("Think before answering").click()
    fake_page.get_by_text("中文").click()
    words_before = fake_api.received[0].words_sent
    wait_until(lambda: fake_api.received[0].words_sent > words_before + 20 or fake_api.received[0].ended, "more of the answer")
    changed.set()

    expect(fake_page.get_by_role("button", name="新对话")).to_be_visible()
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("the end")
    assert fake_api.received[0].left_at is None
    fake_api.answer = Answer(text="ok")
    ask(fake_page, "再说一遍")
    wait_until(lambda: len(fake_api.received) == 2, "the second question")
    assert fake_api.received[1].body["chat_template_kwargs"] == {"enable_thinking": False}


def test_text_of_the_model_runs_nothing_and_fetches_nothing(fake_page: Page, fake_api: FakeApi) -> None:
    beacon = f"{fake_api.url}/beacon.png"
    fake_api.answer = Answer(
        text=f"<img src='{beacon}?html' onerror='window.hacked=1'><script>window.hacked=1</script> "
        f"![x]({beacon}?inline) ![y][r] <b>bold</b>\n\n[r]: {beacon}?reference\n\nThe last word.",
        reasoning=f"![z]({beacon}?thought)",
    )
    ask(fake_page, "Hello")

    text = last_answer(fake_page)
    fake_page.get_by_text(re.compile("Thought for")).click()

    assert "<b>bold</b>" in text
    assert "The last word." in text
    assert fake_page.evaluate("window.hacked") is None
    # Even if the page had left an image in, the Content-Security-Policy would refuse to load it.
    refused = fake_page.evaluate(
        "url => new Promise(done => {const i = new Image(); i.onload = () => done(false);"
        " i.onerror = () => done(true); i.src = url})",
        f"{beacon}?direct",
    )
    assert refused
    assert fake_api.other_hits == []


def test_a_wrong_token_is_refused_and_the_right_one_opens_the_page(one_page_server: Server, open_page: OpenPage) -> None:
    page = open_page(one_page_server, query="?token=wrong")
    expect(page.get_by_text("This token is not right.")).to_be_visible()
    expect(page.get_by_test_id("stChatInput")).to_have_count(0)

    page.get_by_label("Token", exact=True).fill(TOKEN)
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_test_id("stChatInput")).to_be_visible()

    page.reload()
    expect(page.get_by_test_id("stChatInput")).to_be_visible()


def test_a_chinese_browser_on_a_phone_gets_a_chinese_page_that_fits(
    one_page_server: Server, fake_api: FakeApi, open_page: OpenPage
) -> None:
    page = open_page(one_page_server, locale="zh-CN", viewport={"width": 390, "height": 844})

    expect(page.get_by_role("heading", name="看图问答")).to_be_visible()
    expect(page.get_by_role("button", name="星形是什么颜色？")).to_be_visible()
    expect(page.get_by_role("heading", name="看图问答")).to_be_in_viewport()
    page.wait_for_function("document.documentElement.scrollWidth <= 390")


def test_a_page_opened_while_the_model_loads_notices_when_it_is_ready(fake_api: FakeApi, fake_page: Page) -> None:
    fake_api.health = {"state": "loading", "progress": 0.5}
    fake_page.reload()
    expect(fake_page.get_by_text("still loading (50 %)")).to_be_visible()

    fake_api.health = {"state": "idle", "progress": 1.0}

    expect(fake_page.get_by_text("still loading")).to_have_count(0)


def test_a_pasted_picture_is_attached(fake_page: Page, fake_api: FakeApi) -> None:
    area = fake_page.get_by_test_id("stChatInputTextArea")
    expect(area).to_be_visible()
    data = list(png(("red", "star"), seed=1))
    area.evaluate(
        "(area, bytes) => {const held = new DataTransfer();"
        " held.items.add(new File([new Uint8Array(bytes)], 'pasted.png', {type: 'image/png'}));"
        " area.dispatchEvent(new ClipboardEvent('paste', {clipboardData: held, bubbles: true, cancelable: true}))}",
        data,
    )
    expect(fake_page.get_by_test_id("stChatInput").get_by_text("pasted.png")).to_be_visible()

    ask(fake_page, "What is it?")
    last_answer(fake_page)

    image, _ = fake_api.received[0].body["messages"][0]["content"]
    assert image["type"] == "image_url"


def test_a_dropped_picture_reaches_the_model(demo_page: Page, tmp_path: Path) -> None:
    file = tmp_path / "dropped.png"
    file.write_bytes(png(("green", "star"), seed=SEED))
    chat_input = demo_page.get_by_test_id("stChatInput")
    expect(chat_input).to_be_visible()
    chat_input.scroll_into_view_if_needed()
    box = chat_input.bounding_box() or {}
    devtools = demo_page.context.new_cdp_session(demo_page)

    def drag(kind: str) -> None:
        """As the operating system does: Chromium finds the element under the pointer."""
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        devtools.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})

    drag("dragEnter")
    drag("dragOver")
    expect(demo_page.get_by_text("Drag and drop files here")).to_be_visible()
    drag("dragOver")
    drag("drop")
    expect(chat_input.get_by_text("dropped.png")).to_be_visible()
    ask(demo_page, "What color is the star?")

    assert colors_in(last_answer(demo_page)) == {"green"}


def test_a_question_is_asked_and_stopped_with_the_keyboard_alone(fake_page: Page, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="word " * 2000, pause_s=0.05)
    expect(fake_page.get_by_role("button", name="What color is the star?")).to_be_visible()

    def walk_to(name: str) -> None:
        focused = "document.activeElement.tagName === 'BUTTON' ? document.activeElement.innerText : ''"
        for _ in range(60):
            fake_page.keyboard.press("Tab")
            if name in fake_page.evaluate(focused):
                return
        pytest.fail(f"the Tab key does not reach {name!r}")

    walk_to("What color is the star?")
    fake_page.keyboard.press("Enter")
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word word")
    walk_to("Stop")
    fake_page.keyboard.press("Enter")

    expect(fake_page.get_by_text("Stopped. What had been written is kept.")).to_be_visible()
    assert fake_api.received[0].left_at


def test_a_picture_from_the_camera_goes_with_the_question(
    one_page_server: Server, fake_api: FakeApi, open_page: OpenPage
) -> None:
    page = open_page(one_page_server, permissions=["camera"])
    page.get_by_role("button", name="Camera").click()
    shutter = page.get_by_test_id("stCameraInputButton")
    expect(shutter).to_be_enabled()
    # Streamlit asks for a stream of full size first and a second later for one of the dialog's size. Between the two
    # there is no frame, and pressing the button does nothing.
    page.wait_for_function("""() => {
        const video = document.querySelector('video');
        return video?.videoWidth > 0 && video.videoWidth < innerWidth;
    }""")
    shutter.click()
    expect(page.get_by_text("Goes with the next question")).to_be_visible()
    ask(page, "What is it?")
    last_answer(page)

    image, _ = fake_api.received[0].body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/")
