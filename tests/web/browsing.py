"""Steps of a visitor in the browser: add an image, ask, read the answer."""

from __future__ import annotations

import io

from playwright.sync_api import Page, expect

from models.shapes.pictures import draw_shapes

TOKEN = "a-token-for-tests"
KEY = "a-key-for-tests"
TIMEOUT_MS = 60_000


def png(*shapes: tuple[str, str], seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_shapes(list(shapes), seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def wait_for_the_run(page: Page) -> None:
    """Until no run of the script is going on: one may redraw the input box, and what was just put into it or sent is lost."""
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")


def add_image(page: Page, name: str, data: bytes) -> None:
    wait_for_the_run(page)
    box = page.get_by_test_id("stChatInput")
    box.locator("input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})
    expect(box.get_by_text(name)).to_be_visible()


def ask(page: Page, question: str) -> None:
    wait_for_the_run(page)
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled()
    box.fill(question)
    send = page.get_by_test_id("stChatInputSubmitButton")
    expect(send).to_be_enabled()  # not while an upload is still running
    send.click()


def last_answer(page: Page, complete: bool = True) -> str:
    """The text of the last answer, once it is complete."""
    message = page.get_by_test_id("stChatMessage").last
    if complete:
        expect(message).to_contain_text("complete")
    return message.inner_text()
