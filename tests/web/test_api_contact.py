"""Whether the page can ask its API, by the page's own route, in front of real servers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from browsing import TOKEN
from page_process import Server
from web_fake_api import FakeApi

from monitor.judge.evidence import ApiContact as ApiContactSeen
from monitor.observe.page_probe import probe_page
from settings import Settings
from web import api_contact
from web.api_client.client import ApiClient
from web.api_contact import ApiContact


class Counted(ApiClient):
    """An API client that answers `status` after `delay_s`, and counts."""

    def __init__(self, status: int, delay_s: float = 0.0) -> None:
        super().__init__("http://user:password@api:8080/")
        self.status, self.delay_s, self.asked, self.at_once, self.most_at_once = status, delay_s, 0, 0, 0

    def models_status(self) -> int:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay_s)
        self.at_once -= 1
        return self.status


async def _elsewhere(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError(scope["path"])


def ask(app: ApiContact, times: int = 1) -> list[dict[str, Any]]:
    bodies: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(json.loads(message["body"]))

    async def all_together() -> None:
        scope = {"type": "http", "method": "GET", "path": api_contact.PATH, "headers": []}
        await asyncio.gather(*(app(scope, _elsewhere, send) for _ in range(times)))

    # In a thread of its own: the browser tests leave an event loop running in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, all_together()).result()
    return bodies


@pytest.mark.parametrize(
    ("status", "word"),
    [(200, "ok"), (401, "refused"), (403, "refused"), (503, "loading"), (429, "loading"), (0, "unreachable"), (404, "unreachable")],
)
def test_the_words(status: int, word: str) -> None:
    assert ask(ApiContact(_elsewhere, Counted(status))) == [{"api": word, "status": status, "address": "api:8080"}]


def test_many_who_ask_make_one_request_and_a_later_one_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Counted(200, delay_s=0.05)
    app = ApiContact(_elsewhere, client)

    assert len(ask(app, times=5)) == 5
    assert (client.asked, client.most_at_once) == (1, 1)

    monkeypatch.setattr(api_contact, "FRESH_S", 0.0)
    client.status = 401
    assert ask(app)[0]["api"] == "refused"


def test_the_real_page_tells_the_checker_whether_its_key_is_right(
    page_server: Callable[..., Server], own_settings: None
) -> None:
    with FakeApi(key="new") as api:
        old = page_server(GLM_WEB_TOKEN=TOKEN, GLM_API_KEY="old", GLM_API_URL=api.url)
        url = old.url + api_contact.PATH

        assert requests.get(url, timeout=20).status_code == 401, "behind the token"
        assert requests.get(f"{url}?token=wrong", timeout=20).status_code == 401
        settings = Settings(web_host="127.0.0.1", web_port=old.port, web_token=TOKEN)
        seen = probe_page(settings, with_script=False).api_contact
    assert seen == ApiContactSeen("refused", 401, f"127.0.0.1:{api.port}")


def test_the_real_page_reaches_the_real_api(real_page_server: Server, real_api: Server) -> None:
    answer = requests.get(f"{real_page_server.url}{api_contact.PATH}?token={TOKEN}", timeout=20)

    assert answer.json() == {"api": "ok", "status": 200, "address": f"127.0.0.1:{real_api.port}"}
    assert "default-src 'self'" in answer.headers["content-security-policy"]
