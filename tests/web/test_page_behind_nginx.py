"""The page through a real nginx that gives it a path of its own: images, cookie, socket, console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
from browsing import TOKEN, add_image, ask, last_answer, png
from nginx_process import Nginx, self_signed
from page_process import OpenPage, Server
from playwright.sync_api import expect
from web_fake_api import FakeApi

from deploy.proxy import Proxy
from settings import Settings


@pytest.fixture(scope="module")
def proxied(one_page_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """proxied(page_path=..., inside=...) -> the URL of nginx in front of the page."""
    with ExitStack() as running:

        def start(**options: object) -> str:
            folder = tmp_path_factory.mktemp("nginx")
            proxy = Proxy(page=f"127.0.0.1:{one_page_server.port}", **options)
            return running.enter_context(Nginx(folder, proxy, Settings())).url

        yield start


@pytest.fixture(scope="module")
def front(proxied: Callable[..., str]) -> str:
    """The page under a path of its own."""
    return proxied(page_path="/glm/") + "/glm"


def test_the_page_works_under_a_path_prefix(front: str, fake_api: FakeApi, open_page: OpenPage) -> None:
    page = open_page(None, url=f"{front}?token={TOKEN}")
    add_image(page, "mine.png", png(("red", "star"), seed=1))
    ask(page, "What is it?")
    assert "red circle" in last_answer(page)

    image, _ = fake_api.received[0].body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png")
    (cookie,) = [each for each in page.context.cookies() if each["name"] == "glm_visitor"]
    assert (cookie["path"], cookie["httpOnly"], cookie["sameSite"]) == ("/glm", True, "Lax")
    assert page.url.startswith(f"{front}/")
    assert "token" not in page.url

    page.get_by_role("link", name="Console").click()
    expect(page.get_by_role("heading", name="Console")).to_be_visible()
    assert page.url.startswith(f"{front}/console")
    page.reload()
    expect(page.get_by_role("heading", name="Console")).to_be_visible()


def test_a_stranger_gets_nothing_through_nginx_either(front: str) -> None:
    for path in ("/", "/console", "/_stcore/host-config"):
        assert requests.get(front + path, timeout=10).status_code == 401


def test_the_console_is_closed_to_visitors_from_outside(proxied: Callable[..., str], open_page: OpenPage) -> None:
    """Also for a visitor who claims to come from inside, and within the open page, where no request is made for it."""
    outside = proxied(inside=("192.0.2.1",))
    claims = {"X-GLM-Console": "", "X-Forwarded-For": "192.0.2.1", "X-Real-IP": "192.0.2.1"}
    page = open_page(None, url=f"{outside}/?token={TOKEN}", extra_http_headers=claims)
    expect(page.get_by_test_id("stChatInput")).to_be_visible()
    expect(page.get_by_role("link", name="Console")).to_have_count(0)

    page.evaluate("history.pushState({}, '', '/console'); dispatchEvent(new PopStateEvent('popstate'))")
    page.wait_for_timeout(1000)
    expect(page.get_by_role("heading", name="Console")).to_have_count(0)
    answer = page.goto(f"{outside}/console")
    assert answer is not None and answer.status == 404
    assert "from the machine itself" in answer.text()


def test_the_console_opens_from_inside(proxied: Callable[..., str], open_page: OpenPage) -> None:
    page = open_page(None, url=f"{proxied()}/?token={TOKEN}")
    page.get_by_role("link", name="Console").click()

    expect(page.get_by_role("heading", name="Console")).to_be_visible()


def test_with_tls_the_socket_works_and_the_cookie_is_secure(
    proxied: Callable[..., str], open_page: OpenPage, fake_api: FakeApi, tmp_path: Path
) -> None:
    front = proxied(**self_signed(tmp_path))
    page = open_page(None, url=f"{front}/?token={TOKEN}", ignore_https_errors=True)
    ask(page, "What is it?")

    assert "red circle" in last_answer(page)
    (cookie,) = [each for each in page.context.cookies() if each["name"] == "glm_visitor"]
    assert cookie["secure"] and page.url.startswith(f"{front}/?chat=")
