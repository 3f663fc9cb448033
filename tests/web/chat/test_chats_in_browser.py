"""Chats in a real Chromium: they survive reloads and page switches, and nobody sees another's."""

from __future__ import annotations

import json
import re
from pathlib import Path

from browsing import add_image, ask, last_answer, png, wait_for_the_run
from page_process import OpenPage, Server, wait_until
from playwright.sync_api import Page, expect
from web_fake_api import Answer, FakeApi

from web.history.chat_store import FILE_NAME


def words_in(message: str) -> int:
    return len(re.findall(r"\bword\b", message))


def test_two_pictures_are_shown_and_sent_and_survive_a_reload(fake_page: Page, fake_api: FakeApi) -> None:
    add_image(fake_page, "one.png", png(("red", "star"), seed=1))
    add_image(fake_page, "two.png", png(("blue", "circle"), seed=2))
    ask(fake_page, "Compare them")
    last_answer(fake_page)
    question = fake_page.get_by_test_id("stChatMessage").first
    expect(question.get_by_role("img", name="Picture:")).to_have_count(2)

    fake_page.reload()

    expect(question.get_by_role("img", name="Picture:")).to_have_count(2)
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("It is a red circle.")
    images = "document.querySelectorAll('[data-testid=stChatMessage] img')"
    fake_page.wait_for_function(f"[...{images}].every(image => image.naturalWidth > 0)")
    assert [part["type"] for part in fake_api.received[0].body["messages"][0]["content"]] == ["image_url", "image_url", "text"]


def test_a_page_switch_ends_the_answer_and_keeps_what_arrived(fake_page: Page, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="word " * 2000, pause_s=0.05)
    ask(fake_page, "Tell me everything")
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word word")

    fake_page.get_by_role("link", name="Console").click()
    expect(fake_page.get_by_role("heading", name="Console")).to_be_visible()
    wait_until(lambda: fake_api.received[0].left_at, "the API to see the disconnect", 30)
    fake_page.get_by_role("link", name="Chat").click()

    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word word")
    expect(fake_page.get_by_text("Stopped. What had been written is kept.")).to_be_visible()


def test_a_reload_ends_the_request_and_keeps_what_arrived(fake_page: Page, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="word " * 2000, pause_s=0.05)
    ask(fake_page, "Tell me everything")
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("word " * 30)

    fake_page.reload()

    expect(fake_page.get_by_text("Stopped. What had been written is kept.")).to_be_visible()
    assert words_in(fake_page.get_by_test_id("stChatMessage").last.inner_text()) >= 10
    wait_until(lambda: fake_api.received[0].left_at, "the API to see the disconnect", 30)


def test_two_people_at_once_see_their_own_chats_only(
    one_page_server: Server, fake_api: FakeApi, open_page: OpenPage
) -> None:
    ann, bob = open_page(one_page_server), open_page(one_page_server)
    fake_api.answer = Answer(text="An answer for Ann alone.")
    add_image(ann, "ann.png", png(("red", "star"), seed=1))
    ask(ann, "Ann's secret question")
    last_answer(ann)
    image = ann.get_by_role("img", name="Picture:").get_attribute("src")

    bob.goto(ann.url)
    ask(bob, "Bob's question")
    last_answer(bob)

    assert "secret" not in bob.inner_text("body")
    assert bob.get_by_role("button", name="Ann's secret question").count() == 0
    assert "Bob" not in ann.inner_text("body")
    assert len(fake_api.received[1].body["messages"]) == 1
    ann.reload()
    expect(ann.get_by_role("button", name="Ann's secret question")).to_be_visible()
    assert ann.get_by_role("button", name="Bob's question").count() == 0
    assert image


def test_chats_are_opened_renamed_saved_and_deleted(fake_page: Page, one_page_server: Server) -> None:
    add_image(fake_page, "mine.png", png(("red", "star"), seed=1))
    ask(fake_page, "The very first question")
    last_answer(fake_page)
    fake_page.get_by_role("button", name="New chat").click()
    expect(fake_page.get_by_test_id("stBottomBlockContainer").get_by_test_id("stChatInput")).to_have_count(0)
    expect(fake_page.get_by_test_id("stChatInput")).to_have_count(1)
    ask(fake_page, "The second question")
    last_answer(fake_page)

    fake_page.get_by_role("button", name="The very first question").click()
    expect(fake_page.get_by_role("img", name="Picture:")).to_have_count(1)
    fake_page.get_by_role("button", name="This chat").click()
    with fake_page.expect_download() as saved:
        fake_page.get_by_role("button", name="Save as JSON").click()
    whole = json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))
    name = fake_page.get_by_label("Name", exact=True)
    name.fill("My star")
    name.press("Enter")
    expect(fake_page.get_by_role("button", name="My star")).to_be_visible()
    fake_page.get_by_text("Delete this chat").click()
    fake_page.get_by_role("button", name="Delete it for good").click()

    expect(fake_page.get_by_role("button", name="My star")).to_have_count(0)
    expect(fake_page.get_by_role("button", name="The second question")).to_be_visible()
    assert whole["turns"][0]["question"] == "The very first question"
    assert next(iter(whole["pictures"].values()))["url"].startswith("data:image/png;base64,")
    assert b"The very first question" not in (one_page_server.log_path.parent / FILE_NAME).read_bytes()


def test_an_answer_is_regenerated_and_a_question_edited(fake_page: Page, fake_api: FakeApi) -> None:
    ask(fake_page, "What is it?")
    last_answer(fake_page)
    fake_api.answer = Answer(text="Another answer.")

    fake_page.get_by_role("button", name="Answer again").click()
    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("Another answer.")
    expect(fake_page.get_by_text("Earlier answer")).to_be_visible()
    fake_page.get_by_role("button", name="Edit the question").click()
    fake_page.get_by_label("Your question").fill("What colour is it?")
    fake_api.answer = Answer(text="Red.")
    fake_page.get_by_role("button", name="Send", exact=True).click()

    expect(fake_page.get_by_test_id("stChatMessage").last).to_contain_text("Red.")
    expect(fake_page.get_by_test_id("stChatMessage")).to_have_count(2)
    assert [received.body["messages"][-1]["content"][0]["text"] for received in fake_api.received] == [
        "What is it?", "What is it?", "What colour is it?",
    ]  # fmt: skip


def test_a_file_that_is_too_large_is_rejected_before_it_is_sent(fake_page: Page, fake_api: FakeApi) -> None:
    box = fake_page.get_by_test_id("stChatInput")
    expect(box).to_be_visible()
    box.locator("input[type=file]").set_input_files({"name": "big.png", "mimeType": "image/png", "buffer": b"x" * (3 * 2**20)})

    expect(fake_page.get_by_text(re.compile("must be 2.*MB or smaller"))).to_be_visible()
    assert fake_api.received == []


def test_a_picture_by_link_is_fetched_by_nobody_but_the_api(fake_page: Page, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text="[[100,200,500,600]]", boxes=[{"bbox_2d": [100, 200, 500, 600], "image": 0}])
    fake_page.get_by_role("button", name="Picture by link").click()
    fake_page.get_by_label("Address of the picture").fill(f"{fake_api.url}/cat.png")
    fake_page.get_by_role("button", name="Add", exact=True).click()
    expect(fake_page.get_by_text("Goes with the next question")).to_be_visible()
    ask(fake_page, "What is it?")
    last_answer(fake_page)

    image, _ = fake_api.received[0].body["messages"][0]["content"]
    assert image["image_url"]["url"] == f"{fake_api.url}/cat.png"
    assert fake_api.other_hits == []
    expect(fake_page.get_by_text("places are listed below and not drawn")).to_be_visible()


def test_a_preset_fills_the_box_and_json_is_checked_against_its_schema(fake_page: Page, fake_api: FakeApi) -> None:
    fake_api.answer = Answer(text='{"objects": [{"color": "red"}]}')
    fake_page.get_by_text("JSON by schema").click()
    area = fake_page.get_by_test_id("stChatInputTextArea")
    expect(area).to_have_value("List the objects as JSON.")
    wait_for_the_run(fake_page)
    area.press("Enter")

    expect(fake_page.get_by_text("does not fit the schema")).to_be_visible()
    response_format = fake_api.received[0].body["response_format"]
    assert response_format["json_schema"]["schema"]["required"] == ["objects"]


def test_every_button_has_a_name_for_screen_readers(fake_page: Page) -> None:
    for name in ("Camera", "Picture by link", "New chat", "Send"):
        expect(fake_page.get_by_role("button", name=re.compile(name)).first).to_be_visible()

    nameless = fake_page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => !b.textContent.trim()"
        " && !b.getAttribute('aria-label') && !b.title && !b.querySelector('[aria-label],title')).map(b => b.outerHTML)"
    )
    assert nameless == []
