"""Fixtures of the page's tests: a fake API, a real page process, a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from urllib.parse import urlsplit

import pytest
from browsing import KEY, TIMEOUT_MS, TOKEN
from page_process import ROOT, OpenPage, Server
from playwright.sync_api import Browser, Page, expect, sync_playwright
from web_fake_api import FakeApi

import settings as settings_module

expect.set_options(timeout=TIMEOUT_MS)  # Playwright's five seconds are too few on a loaded machine


@pytest.fixture(scope="session")
def one_fake_api() -> Iterator[FakeApi]:
    with FakeApi() as fake:
        yield fake


@pytest.fixture
def fake_api(one_fake_api: FakeApi) -> FakeApi:
    one_fake_api.reset()
    return one_fake_api


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignores .env and the GLM_ variables of the environment."""
    monkeypatch.setattr(settings_module, "ENV_FILE", tmp_path / "no.env")
    monkeypatch.setitem(settings_module.Settings.model_config, "env_file", None)
    for name in [name for name in os.environ if name.startswith("GLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLM_LOG_DIR", str(tmp_path / "logs"))


@pytest.fixture
def page_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts `python -m web.server` with the given GLM_ settings."""
    running: list[Server] = []

    def start(**settings: str) -> Server:
        settings = {"GLM_LOG_DIR": str(tmp_path / "logs"), **settings}
        server = Server("web.server", "/_stcore/health", tmp_path / f"web-{len(running)}.log", **settings)
        running.append(server.__enter__())
        return server

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A real browser. Without one the tests fail instead of being skipped, because nothing else covers this.

    Not for the session: while it is open, Playwright's event loop counts as running in this thread, and the tests of
    other files could not start one.
    """
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := which(name))), None)
    if found is None:
        pytest.fail("no Chromium on PATH: install it (Debian: apt install chromium) to run the browser tests")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--use-fake-device-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """Opens a page of a server; takes Playwright's options of a browser context (locale, colour scheme, viewport).

    Fails if the browser requested anything from another machine.
    """
    contexts = []
    elsewhere: list[str] = []

    def record(url: str) -> None:
        if urlsplit(url).hostname not in (None, "127.0.0.1"):
            elsewhere.append(url)

    def open_it(server: Server | None, query: str = f"?token={TOKEN}", url: str = "", **browser: object) -> Page:
        context = chromium.new_context(**{"locale": "en-US", **browser})  # type: ignore[arg-type]
        contexts.append(context)
        context.on("request", lambda request: record(request.url))
        page = context.new_page()
        page.on("websocket", lambda socket: record(socket.url))
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(url or f"{server.url}/{query}")  # type: ignore[union-attr]
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert elsewhere == []


@pytest.fixture(scope="session")
def one_page_server(one_fake_api: FakeApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One page for all tests that need no settings of their own; each test is a new visitor."""
    folder = tmp_path_factory.mktemp("page")
    settings = {"GLM_WEB_TOKEN": TOKEN, "GLM_API_KEY": KEY, "GLM_API_URL": one_fake_api.url, "GLM_LOG_DIR": str(folder)}
    with Server("web.server", "/_stcore/health", folder / "web.log", **settings) as server:
        yield server


@pytest.fixture
def fake_page(one_page_server: Server, fake_api: FakeApi, open_page: OpenPage) -> Page:
    """The real page in front of the fake API."""
    return open_page(one_page_server)


@pytest.fixture(scope="session")
def real_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real API with the bundled demo model."""
    folder = tmp_path_factory.mktemp("api")
    settings = {
        "GLM_API_KEY": KEY, "GLM_MODEL": str(ROOT / "models" / "shapes"), "GLM_DEVICE": "cpu", "GLM_LOG_DIR": str(folder),
        "GLM_SLOTS": "2",  # few, so that a test can occupy them all and queue
    }  # fmt: skip
    with Server("api.server", "/health", folder / "api.log", **settings) as api:
        yield api


@pytest.fixture(scope="session")
def real_page_server(real_api: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real page in front of the real API."""
    folder = tmp_path_factory.mktemp("real-page")
    settings = {"GLM_WEB_TOKEN": TOKEN, "GLM_API_KEY": KEY, "GLM_API_URL": real_api.url, "GLM_LOG_DIR": str(folder)}
    with Server("web.server", "/_stcore/health", folder / "web.log", **settings) as server:
        yield server
