"""Screenshots of the pages for people to look at; `SCREENSHOTS=docs pytest tests/web/test_screenshots.py` renews them.

Each is taken once the page shows its subject; no page may be wider than its window.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from itertools import groupby
from pathlib import Path

import pytest
from browsing import KEY, TOKEN, add_image, ask, last_answer, wait_for_the_run
from console_record import HEALTHY, STARTING, WEDGED, incident_of, record
from page_process import OpenPage, Server, wait_until
from playwright.sync_api import FloatRect, Locator, Page, expect
from web_fake_api import Answer, FakeApi

from monitor.store.store import Store
from web.samples import sample_named

DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
HOUR_S = 3600
# All finite animations have ended; spinners run for ever.
AT_REST = """document.getAnimations().every(
    a => a.playState !== "running" || a.effect.getComputedTiming().iterations === Infinity)"""
NOTHING_OVERHANGS = "document.documentElement.scrollWidth <= window.innerWidth"

Opened = Callable[..., Page]


@pytest.fixture
def really_opened(real_page_server: Server, open_page: OpenPage) -> Opened:
    """In front of the demo model, so that the screenshots show real answers."""
    return lambda **browser: open_page(real_page_server, **{"viewport": DESK, **browser})


@pytest.fixture
def opened_without_model(one_page_server: Server, fake_api: FakeApi, open_page: OpenPage) -> Opened:
    """In front of the fake API."""
    return lambda **browser: open_page(one_page_server, **{"viewport": DESK, **browser})


@pytest.fixture
def opened_console(page_server: Callable[..., Server], fake_api: FakeApi, open_page: OpenPage) -> Opened:
    server = page_server(GLM_WEB_TOKEN=TOKEN, GLM_API_KEY=KEY, GLM_API_URL=fake_api.url, GLM_OPERATOR_TOKEN="operator", GLM_GPU_MEMORY_LIMIT_MIB="40000")

    def open_it(**browser: object) -> Page:
        return open_page(server, f"console?token={TOKEN}", **{"viewport": DESK, **browser})

    return open_it


def take(page: Page, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    page.mouse.move(2, 2)
    # Streamlit loads the code of its components one by one and shows skeletons meanwhile.
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0)
    page.wait_for_function("[...document.images].every(i => i.complete)")
    page.wait_for_function(AT_REST)
    page.wait_for_function(NOTHING_OVERHANGS)
    page.screenshot(path=folder / f"{name}.png")


def rows_of(cards: Locator) -> list[list[FloatRect]]:
    boxes = [box for card in cards.all() if (box := card.bounding_box())]
    return [list(row) for _, row in groupby(boxes, key=lambda box: round(box["y"]))]


def ask_about_the_sample(page: Page, question: str) -> None:
    page.get_by_role("button", name=question).click()


def test_chat(really_opened: Opened, tmp_path: Path) -> None:
    page = really_opened()
    ask_about_the_sample(page, "What color is the star?")
    assert "blue" in last_answer(page)

    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    take(page, "chat", tmp_path)


def test_thinking(opened_without_model: Opened, fake_api: FakeApi, tmp_path: Path) -> None:
    fake_api.answer = Answer(text="Two.", reasoning="I count the shapes one by one. " * 200, pause_s=0.05)
    page = opened_without_model()
    ask_about_the_sample(page, "What color is the star?")

    expect(page.get_by_text("Thinking…")).to_be_visible()
    take(page, "thinking", tmp_path)
    page.get_by_role("button", name="Stop", exact=True).click()


def test_boxes(really_opened: Opened, tmp_path: Path) -> None:
    page = really_opened(viewport={"width": 1200, "height": 1200})
    ask_about_the_sample(page, "Where is the heart?")
    last_answer(page)
    page.get_by_text("1 marked in").click()

    expect(page.get_by_role("columnheader", name="0-1000")).to_be_visible()
    expect(page.get_by_role("img", name="Where it is, drawn on")).to_be_visible()
    page.get_by_role("img", name="Where it is, drawn on").scroll_into_view_if_needed()
    take(page, "boxes", tmp_path)


def test_error(opened_without_model: Opened, fake_api: FakeApi, tmp_path: Path) -> None:
    fake_api.answer = Answer(status=503, error={"code": "queue_full"})
    page = opened_without_model()
    ask(page, "What is in the picture?")

    expect(page.get_by_text("Too many people are asking right now.")).to_be_visible()
    expect(page.get_by_text("Request req-42")).to_be_visible()
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    take(page, "error", tmp_path)


def test_dark(really_opened: Opened, tmp_path: Path) -> None:
    page = really_opened(color_scheme="dark", viewport={"width": 1200, "height": 1200})
    add_image(page, "shapes.png", sample_named("shapes.png").path.read_bytes())  # type: ignore[union-attr]
    page.get_by_text("JSON by schema").click()
    area = page.get_by_test_id("stChatInputTextArea")
    expect(area).to_have_value("List the objects as JSON.")
    wait_for_the_run(page)
    area.press("Enter")

    expect(page.get_by_text("Valid JSON that fits the schema")).to_be_visible()
    take(page, "dark", tmp_path)


def test_chinese(really_opened: Opened, tmp_path: Path) -> None:
    page = really_opened(locale="zh-CN")
    page.get_by_role("button", name="星形是什么颜色？").click()

    expect(page.get_by_role("button", name="重新回答")).to_be_visible()
    take(page, "chinese", tmp_path)


def test_phone(really_opened: Opened, tmp_path: Path) -> None:
    page = really_opened(viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
    ask_about_the_sample(page, "Where is the heart?")
    last_answer(page)

    expect(page.get_by_role("img", name="Where it is, drawn on")).to_be_visible()
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    take(page, "phone", tmp_path)


def test_console_healthy(opened_console: Opened, fake_api: FakeApi, tmp_path: Path) -> None:
    now = time.time()
    fake_api.health |= {"running": 2, "waiting": 0, "version": "0.1.0", "uptime_s": 183_000, "phase": "decode"}
    record(tmp_path / "logs", now, 30, lambda age: None if 14 * HOUR_S < age < 15 * HOUR_S else HEALTHY, 300)
    page = opened_console()

    expect(page.get_by_text("Operational since")).to_be_visible()
    expect(page.get_by_test_id("stVegaLiteChart").first).to_be_visible()
    take(page, "console", tmp_path)


def test_the_console_s_figures_fill_their_rows(opened_console: Opened, tmp_path: Path) -> None:
    record(tmp_path / "logs", time.time(), 2, lambda age: HEALTHY, 300)
    page = opened_console()
    cards = page.get_by_test_id("stMetric")
    for width, cards_per_row in ((1280, [3, 3, 3]), (390, [2, 1] * 3)):
        page.set_viewport_size({"width": width, "height": 900})
        page.reload()
        expect(cards).to_have_count(9)
        expect(page.get_by_test_id("stVegaLiteChart").first).to_be_visible()
        wait_until(lambda lengths=cards_per_row: [len(row) for row in rows_of(cards)] == lengths, f"rows of {cards_per_row}")
        rows = rows_of(cards)
        ends = {round(row[-1]["x"] + row[-1]["width"]) for row in rows}
        assert max(ends) - min(ends) <= 2, "each row is as wide as the others"
        page.wait_for_function(NOTHING_OVERHANGS)


def test_console_in_an_incident(opened_console: Opened, fake_api: FakeApi, tmp_path: Path) -> None:
    now, logs = time.time(), tmp_path / "logs"
    fake_api.health |= {"running": 1, "waiting": 3, "version": "0.1.0", "uptime_s": 18_300, "phase": "decode"}

    def verdict(age: float) -> dict[str, str]:
        if age < 15 * 60 or 5 * HOUR_S < age < 5.5 * HOUR_S:
            return WEDGED
        return STARTING if 4.9 * HOUR_S < age <= 5 * HOUR_S else HEALTHY

    record(logs, now, 30, verdict, 300)
    with closing(Store.open(logs)) as store, store.transaction():
        store.put_incident(incident_of(now, 15 * 60, None))
        store.put_incident({**incident_of(now, 5.5 * HOUR_S, 5 * HOUR_S), "id": "api-earlier"}, now - 4.8 * HOUR_S)
        store.add_action(now - 60, "api", "restart", "checker", "failed", "no right answer within 90 s", "api-20261122-0310", 94)
    page = opened_console(viewport={"width": 1200, "height": 1500})

    expect(page.get_by_text("Down since")).to_be_visible()
    expect(page.get_by_text("no right answer within 90 s")).to_be_attached()
    expect(page.get_by_test_id("stVegaLiteChart").first).to_be_visible()
    take(page, "console-incident", tmp_path)
    page.get_by_role("heading", name="Incidents").scroll_into_view_if_needed()
    expect(page.get_by_text("no right answer within 90 s")).to_be_in_viewport()
    expect(page.get_by_text("good again").first).to_be_attached()
    take(page, "console-incidents", tmp_path)


def test_an_operator_requests_a_restart_with_name_and_typed_confirmation(opened_console: Opened, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    record(logs, time.time(), 1, lambda age: HEALTHY)
    page = opened_console()

    page.get_by_label("Operator token").fill("operator")
    page.get_by_role("button", name="Unlock").click()
    page.get_by_role("button", name="Restart the model server").click()
    confirm = page.get_by_role("button", name="Ask the checker to do it")
    confirm.click()
    expect(page.get_by_text("the audit log needs a name")).to_be_visible()
    name = page.get_by_label("Your name, for the audit log")
    name.fill("Ann")
    name.press("Enter")
    confirm.click()
    expect(page.get_by_text("This does not match the word above")).to_be_visible()
    assert _requests(logs) == []
    word = page.get_by_label("Type glm-shapes-demo to confirm")
    word.fill("glm-shapes-demo")
    word.press("Enter")
    confirm.click()

    expect(page.get_by_text("waits for the checker")).to_be_visible()
    assert _requests(logs) == [("restart", "api", "console: Ann", "waiting")]
    with closing(Store.open(logs)) as store, store.transaction():
        store.end_request(1, time.time(), "done", "restarted and verified")
    expect(page.get_by_text("restarted and verified")).to_be_visible()


def _requests(logs: Path) -> list[tuple[str, str, str, str]]:
    with closing(Store.open(logs)) as store:
        return [(row["kind"], row["target"], row["actor"], row["state"]) for row in store.requests()]
