"""The application with an engine behind it, called in process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_stand_in import StandIn
from served import KEY, wait_for
from starlette.testclient import TestClient

from api.app import create_app
from api.behind.remote_engine import RemoteEngine
from settings import Settings

# vLLM is no dependency: it is tested where it is installed. TEST_VLLM names its program, where PATH does not have it.
collect_ignore = [] if os.environ.get("TEST_VLLM") or shutil.which("vllm") else ["test_vllm.py"]


class Front:
    def __init__(self, settings: Settings) -> None:
        self.engine = RemoteEngine(settings)
        self.client = TestClient(create_app(settings, self.engine), headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False)

    def health(self) -> dict[str, Any]:
        return self.client.get("/health").json()


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Callable[..., Front]]:
    """front(engine) -> the API in front of it, once it knows its model; `ready=False`: at once."""
    running: list[Front] = []

    def start(engine: StandIn | str, ready: bool = True, **options: Any) -> Front:
        url = engine if isinstance(engine, str) else engine.url
        made = Front(Settings(**{"api_key": KEY, "log_dir": tmp_path / "logs", "engine_url": url, **options}))
        made.client.__enter__()
        running.append(made)
        if ready:
            wait_for(lambda: made.engine.stats().state != "loading")
        return made

    yield start
    for made in running:
        made.client.__exit__(None, None, None)
