"""The page through a real nginx that gives it a path of its own: images, cookie, socket, console."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from shutil import which

import pytest
import requests
from browsing import TOKEN, add_image, ask, last_answer, png
from page_process import ROOT, OpenPage, Server, wait_until
from playwright.sync_api import expect
from ports import free_port
from web_fake_api import FakeApi

WRAPPED = """
worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 128; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    {shipped}
}}
"""


@pytest.fixture(scope="module")
def front(one_page_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the page behind nginx, with the configuration that is shipped."""
    nginx = which("nginx") or "/usr/sbin/nginx"
    folder = tmp_path_factory.mktemp("nginx")
    port = free_port()
    shipped = (ROOT / "deploy" / "nginx" / "page.conf").read_text(encoding="utf-8")
    assert "listen 80;" in shipped
    assert "http://127.0.0.1:8081/" in shipped
    shipped = shipped.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("http://127.0.0.1:8081/", f"{one_page_server.url}/")
    conf = folder / "nginx.conf"
    conf.write_text(WRAPPED.format(folder=folder, shipped=shipped), encoding="utf-8")
    process = subprocess.Popen([nginx, "-c", str(conf), "-p", str(folder), "-g", "daemon off;"])
    try:
        url = f"http://127.0.0.1:{port}/glm"
        wait_until(lambda: _answers(f"{url}/_stcore/health"), "nginx", 30)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).status_code == 200
    except requests.RequestException:
        return False


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
