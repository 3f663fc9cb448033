"""The real server with a model in bfloat16: it compiles the kernels while it loads, and answers as with torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ports import free_port
from served import wait_for
from server_process import HEADERS, WAIT_S, Server
from test_demo_model import ASK


@pytest.fixture
def serve_demo(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that share a cache of compiled kernels, empty at first."""
    servers: list[Server] = []

    def start(**settings: str) -> Server:
        servers.append(Server(
            free_port(), tmp_path / f"api-{len(servers)}.log", [sys.executable, "-m", "api.server"],
            GLM_MODEL="models/shapes", GLM_DEVICE="cpu", GLM_DTYPE="bfloat16", GLM_THREADS="2",
            GLM_LOG_DIR=str(tmp_path / f"logs-{len(servers)}"), XDG_CACHE_HOME=str(tmp_path / "cache"), **settings,
        ))  # fmt: skip
        servers[-1].until(lambda health: health["state"] == "idle", 300)
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait(WAIT_S)


def test_a_server_compiles_before_it_is_ready_and_answers_as_with_torch(
    serve_demo: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve_demo()
    if "the next start will use them" in kernels(server)[1]:  # a busy machine: the compiler goes on in the background
        wait_for(lambda: any((tmp_path / "cache").rglob("*.trial")), 300)
        server = serve_demo()
    with_torch = serve_demo(GLM_KERNELS="torch")

    value, reason = kernels(server)

    assert value == "compiled" and "see proofs" in reason
    found = proofs(server)
    assert "attention decode" in found or "see the next start" in found["products"], found  # a machine too busy to measure
    assert str(tmp_path) not in f"{reason} {found}"
    assert kernels(with_torch) == ("torch", "set by GLM_KERNELS")
    text = answer(server)
    assert text == answer(with_torch)
    assert "1" in text or "one" in text.lower()
    server.until_logged('name=kernels value=compiled reason="each operation')


def kernels(server: Server) -> tuple[str, str]:
    info: dict[str, Any] = httpx.get(f"{server.url}/info", headers=HEADERS, timeout=WAIT_S).json()
    return info["kernels"], info["choices"]["kernels"]


def proofs(server: Server) -> dict[str, str]:
    return httpx.get(f"{server.url}/info", headers=HEADERS, timeout=WAIT_S).json()["proofs"]


def answer(server: Server) -> str:
    response = server.post({"messages": ASK, "max_tokens": 32, "temperature": 0})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]
