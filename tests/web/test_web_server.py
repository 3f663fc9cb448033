"""The page's process: how it starts, what it sends with every answer, how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from page_process import Server

import settings as settings_module
from web import server


def test_it_refuses_to_be_open_to_everyone(own_settings: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = server.main(["--host", "0.0.0.0"])

    assert code == 1
    assert "GLM_WEB_TOKEN is not set" in capsys.readouterr().err


def test_a_bad_setting_stops_the_start_with_its_name(
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
def test_only_loopback_counts_as_this_machine(host: str, inside: bool) -> None:
    assert server._is_loopback(host) is inside


def test_every_answer_forbids_pictures_from_elsewhere_and_the_process_ends_when_told(
    page_server: Callable[..., Server],
) -> None:
    running = page_server(GLM_WEB_TOKEN="right", GLM_API_URL="http://127.0.0.1:9")

    for path in ("/", "/_stcore/health"):
        headers = requests.get(running.url + path, timeout=10).headers
        assert "img-src 'self' data: blob:;" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"

    assert running.process is not None
    told_at = time.monotonic()
    running.process.terminate()
    running.process.wait(30)
    assert time.monotonic() - told_at < 10


def test_a_port_in_use_stops_the_start(one_page_server: Server, tmp_path: Path) -> None:
    first = one_page_server

    second = Server("web.server", "/_stcore/health", tmp_path / "second.log", GLM_WEB_TOKEN="right")
    second.use_port(first.port)
    code = second.run_to_its_end()

    assert code != 0
    assert f"Port {first.port} is not available" in second.log_text()
