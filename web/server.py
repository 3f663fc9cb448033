"""`python -m web.server`: serves the page in this process, so that its pid is the server's.

Owns Streamlit's options. `web/access.py` decides who may see the page, `web/app.py` what it shows.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import logging
import math
import socket
import sys
import uuid
from pathlib import Path

import streamlit as st
import uvicorn
from starlette.middleware import Middleware

import log_output
import settings as settings_module
from settings import Settings, SettingsError
from web.access import Access
from web.api_client.client import ApiClient
from web.api_contact import ApiContact
from web.i18n.strings import Texts

APP = Path(__file__).resolve().parent / "app.py"

log = logging.getLogger("web")


def streamlit_options(settings: Settings) -> dict[str, object]:
    """The options that `streamlit run` would take as flags."""
    return {
        "server.address": settings.web_host,
        "server.port": settings.web_port,
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "server.maxUploadSize": math.ceil(settings.max_image_bytes / 2**20),
        "server.enableXsrfProtection": True,
        "server.enableCORS": True,
        "server.enableStaticServing": False,
        "server.scriptHealthCheckEnabled": True,  # for health_check.py
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "client.showErrorLinks": False,
        "logger.hideWelcomeMessage": True,
        "theme.baseRadius": "0.6rem",
        "theme.light.primaryColor": "#3b5bdb",
        "theme.light.backgroundColor": "#ffffff",
        "theme.light.secondaryBackgroundColor": "#f3f5fa",
        "theme.light.textColor": "#1c2333",
        "theme.dark.primaryColor": "#748ffc",
        "theme.dark.backgroundColor": "#12151c",
        "theme.dark.secondaryBackgroundColor": "#1c2130",
        "theme.dark.textColor": "#e8ebf3",
    }


class PromptServer(uvicorn.Server):
    """A server whose connections have TCP_NODELAY, without which answers on a kept connection come 40 ms late."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or []:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)


def create_app(token: str, client: ApiClient) -> st.App:
    middleware = [Middleware(Access, token=token), Middleware(ApiContact, client=client)]
    return st.App(str(APP), middleware=middleware, on_script_error=_show_failure)


def _show_failure(error: Exception) -> bool:
    """For a bug in the page: log the traceback, and show the visitor a sentence with an id to report."""
    failure_id = uuid.uuid4().hex[:8]
    log.error("page failed id=%s", failure_id, exc_info=error)
    st.error(Texts(st.session_state.get("language", "en"))("error.page", id=failure_id))
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m web.server", description="Serve the picture page.")
    parser.add_argument("--host", help="address to listen on (default: GLM_WEB_HOST)")
    parser.add_argument("--port", type=int, help="port to listen on (default: GLM_WEB_PORT)")
    arguments = parser.parse_args(argv)
    log_output.set_up()
    try:
        settings = settings_module.load(web_host=arguments.host, web_port=arguments.port)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    if settings.web_token is None and not _is_loopback(settings.web_host):
        print(
            f"GLM_WEB_TOKEN is not set, and GLM_WEB_HOST={settings.web_host} lets other machines reach the page. "
            "Set GLM_WEB_TOKEN to a long random word (./start.sh does it), or GLM_WEB_HOST=127.0.0.1.",
            file=sys.stderr,
        )
        return 1
    settings_module.keep(settings)  # for every visitor, so that a typo in .env stops nobody
    log.info("page address=http://%s:%d/ api=%s", settings.web_host, settings.web_port, settings.api_base_url)
    sys.argv = sys.argv[:1]
    _share_freed_memory()
    token = settings.web_token.get_secret_value() if settings.web_token else ""
    uvicorn.Server = PromptServer  # type: ignore[misc]  # Streamlit offers no way to its listener
    create_app(token, ApiClient.of(settings)).run(config=streamlit_options(settings))
    return 0


def _share_freed_memory() -> None:
    """Limit glibc to one malloc arena: otherwise each session's thread holds an arena full of freed images."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-8, 1)  # M_ARENA_MAX


if __name__ == "__main__":
    sys.exit(main())
