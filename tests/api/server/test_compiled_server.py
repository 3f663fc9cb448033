"""The real server with a model in bfloat16: it answers while it compiles its kernels, and the same afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import HEADERS, WAIT_S, Server, free_port
from test_demo_model import ASK

COMPILE_S = 180.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """With a cache of compiled kernels that is empty."""
    server = Server(
        free_port(), tmp_path / "api.log", [sys.executable, "-m", "api.server"],
        GLM_MODEL="models/shapes", GLM_DEVICE="cpu", GLM_DTYPE="bfloat16", GLM_THREADS="2",
        GLM_LOG_DIR=str(tmp_path / "logs"), XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    try:
        server.until(lambda health: health["state"] == "idle", 300)
        yield server
    finally:
        server.process.kill()
        server.process.wait(WAIT_S)


def test_a_server_answers_while_it_compiles_and_the_same_afterwards(server: Server, tmp_path: Path) -> None:
    before = kernels(server)
    first = answer(server)
    until = time.monotonic() + COMPILE_S
    while kernels(server)[0] == "compiling" and time.monotonic() < until:
        time.sleep(0.2)

    value, reason = kernels(server)

    assert before[0] == "compiling" and "torch" in before[1]
    assert value == "compiled" and reason.startswith(str(tmp_path / "cache")) and Path(reason).is_file()
    assert answer(server) == first
    assert "1" in first or "one" in first.lower()
    server.until_logged("name=kernels value=compiled")


def kernels(server: Server) -> tuple[str, str]:
    info: dict[str, Any] = httpx.get(f"{server.url}/info", headers=HEADERS, timeout=WAIT_S).json()
    return info["kernels"], info["choices"]["kernels"]


def answer(server: Server) -> str:
    response = server.post({"messages": ASK, "max_tokens": 32, "temperature": 0})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]
