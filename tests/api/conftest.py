"""The app around a fake model, called in process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import fake_model
from ports import free_port
from served import KEY, Served, wait_for
from server_process import WAIT_S, Server

from api.engine.engine import Engine
from api.engine.kernels import build
from api.engine.loaded_model import Model
from settings import Settings

# Kernels are compiled for supported processors only.
collect_ignore = [] if build.processor_supported() else ["server/test_compiled_server.py"]

@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """serve(answer=..., load=..., queue_size=...) -> Served. `load` replaces the loading of the fake model."""
    running: list[Served] = []

    def start(load: Callable[..., Model] | None = None, **options: Any) -> Served:
        model_options = {
            k: options.pop(k) for k in ("answer", "token_s", "context_tokens", "slots", "pages") if k in options
        }
        settings = Settings(**{"api_key": KEY, "queue_size": 4, "log_dir": tmp_path / "logs", **options})
        model = fake_model(**model_options)
        served = Served(settings, model, Engine(load or (lambda progress: model), settings.queue_size))
        served.client.__enter__()
        running.append(served)
        if load is None:
            wait_for(lambda: served.engine.stats().state != "loading")
        return served

    yield start
    for served in running:
        served.runner.release.set()
        served.client.__exit__(None, None, None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def run(**environment: str) -> Server:
        servers.append(Server(free_port(), tmp_path / f"api-{len(servers)}.log", **environment))
        servers[-1].until(lambda health: health["state"] == "idle")
        return servers[-1]

    yield run
    for server in servers:
        server.process.kill()
        server.process.wait(WAIT_S)
