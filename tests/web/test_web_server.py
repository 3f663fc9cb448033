"""The page's process: its start, its response headers, its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from kept_connection import has_no_delay, slowdown_of_kept
from page_process import Server

import settings as settings_module
from web import server


def test_without_a_token_it_refuses_to_listen_on_all_addresses(own_settings: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = server.main(["--host", "0.0.0.0"])

    assert code == 1
    assert "GLM_WEB_TOKEN is not set" in capsys.readouterr().err


def test_an_invalid_setting_stops_the_start_with_its_name(
    own_settings: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLM_WEB_PORT", "eighty")

    assert server.main([]) == 1
    assert "GLM_WEB_PORT" in capsys.readouterr().err


def test_the_upload_limit_of_the_server_follows_the_setting(own_settings: None) -> None:
    settings = settings_module.load(max_image_bytes=3 * 2**20 + 1)

    assert server.streamlit_options(settings)["server.maxUploadSize"] == 4


@pytest.mark.parametrize(
    ("host", "inside"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_only_loopback_addresses_count_as_this_machine(host: str, inside: bool) -> None:
    assert server._is_loopback(host) is inside


def test_every_response_forbids_remote_images_and_sigterm_ends_the_process(
    page_server: Callable[..., Server],
) -> None:
    running = page_server(GLM_WEB_TOKEN="right", GLM_API_URL="http://127.0.0.1:9")

    for path in ("/", "/_stcore/health"):
        headers = requests.get(running.url + path, timeout=10).headers
        assert "img-src 'self' data: blob:;" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"

    assert running.process is not None
    terminated_at = time.monotonic()
    running.process.terminate()
    running.process.wait(30)
    assert time.monotonic() - terminated_at < 10


def test_a_port_in_use_stops_the_start(one_page_server: Server, tmp_path: Path) -> None:
    first = one_page_server

    second = Server("web.server", "/_stcore/health", tmp_path / "second.log", GLM_WEB_TOKEN="right")
    second.use_port(first.port)
    code = second.run_until_exit()

    assert code != 0
    assert f"Port {first.port} is not available" in second.log_text()


def test_a_kept_connection_to_the_page_is_no_slower_than_a_new_one(one_page_server: Server) -> None:
    assert one_page_server.process is not None

    assert has_no_delay(one_page_server.process.pid, one_page_server.port)
    assert slowdown_of_kept(one_page_server.url + "/_stcore/health") < 1.5
