"""The first start of the real server, with a model that has yet to come from a hub."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_stand_in import COMMIT, SCOPE_COMMIT, Fault, HubStandIn, files_of
from ports import free_port
from server_process import HEADERS, ROOT, WAIT_S, Server

LOAD_S = 300.0
FILES = files_of(ROOT / "models" / "shapes")
TOTAL = sum(len(content) for name, content in FILES.items() if not name.endswith((".md", ".py")))


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    stand_in = HubStandIn(FILES)
    yield stand_in
    stand_in.close()


@pytest.fixture
def start(hub: HubStandIn, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts the server on the same caches each time."""
    made: list[Server] = []

    def start_it(**environment: str) -> Server:
        caches = {
            "HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_CACHE": str(tmp_path / "ms"), "HF_ENDPOINT": hub.url,
            "MODELSCOPE_ENDPOINT": hub.url, "GLM_DEVICE": "cpu", "GLM_LOG_DIR": str(tmp_path / "logs"),
        }  # fmt: skip
        log = tmp_path / f"api{len(made)}.log"
        made.append(Server(free_port(), log, [sys.executable, "-m", "api.server"], **(caches | environment)))
        return made[-1]

    yield start_it
    hub.released.set()
    for server in made:
        server.process.kill()
        server.process.wait(WAIT_S)


def downloads(health: dict[str, Any], least: int = 1) -> bool:
    assert health["state"] in ("down", "loading"), health
    return (health.get("download") or {}).get("downloaded_bytes", 0) >= least


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_a_first_start_tells_its_bytes_and_survives_a_kill(hub: HubStandIn, start: Callable[..., Server], name: str) -> None:
    hub.rate = 3e6
    first = start(GLM_MODEL="owner/shapes", GLM_HUB=name)
    told = first.until(lambda health: downloads(health, 2_000_000), LOAD_S)["download"]
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    sent, hub.rate = hub.sent, 0.0

    second = start(GLM_MODEL="owner/shapes", GLM_HUB=name)
    ready = second.until(lambda health: health["state"] == "idle", LOAD_S)

    assert set(told) == {"hub", "file", "downloaded_bytes", "total_bytes", "bytes_per_s", "remaining_s", "trouble"}
    assert told["total_bytes"] == TOTAL and told["file"] == "model.safetensors"
    assert told["hub"].startswith({"huggingface": "Hugging Face (", "modelscope": "ModelScope ("}[name])
    assert 5e5 < told["bytes_per_s"] < 1e7 and 0 < told["remaining_s"] < 20
    assert "download" not in ready
    assert sent >= 2_000_000 and hub.sent < TOTAL + 500_000, "it went on where it was killed"
    info = httpx.get(f"{second.url}/info", headers=HEADERS).json()
    assert info["revision"] == {"huggingface": COMMIT, "modelscope": SCOPE_COMMIT}[name]
    assert second.post({"messages": [{"role": "user", "content": "What can you do?"}]}).status_code == 200

    hub.close()  # from here on there is no network
    third = start(GLM_MODEL="owner/shapes", GLM_HUB=name)
    assert third.until(lambda health: health["state"] == "idle", LOAD_S)["model"] == ready["model"]


def test_health_says_which_hub_serves_instead_and_why(hub: HubStandIn, start: Callable[..., Server]) -> None:
    hub.faults = [Fault("stall", after=1_000_000)]
    server = start(GLM_MODEL="zai-org/shapes", HF_ENDPOINT="http://user:secret@127.0.0.1:9")

    health = server.until(lambda health: downloads(health, 1_000_000), LOAD_S)

    assert health["download"]["hub"].startswith("ModelScope (127.0.0.1:")
    assert "Hugging Face (127.0.0.1:9) cannot be reached" in health["download"]["trouble"]
    log = server.until_logged("event=download_elsewhere hub=modelscope model=ZhipuAI/shapes")
    assert "secret" not in log and "secret" not in str(health)


def test_a_refusal_of_the_hub_is_the_reason_in_health(hub: HubStandIn, start: Callable[..., Server]) -> None:
    hub.token = "needed"
    server = start(GLM_MODEL="owner/shapes@v1")

    health = server.until(lambda health: health["state"] == "dead", LOAD_S)

    assert "owner/shapes with status 401" in health["reason"] and "set HF_TOKEN" in health["reason"]
    assert "download" not in health


def test_the_variables_of_the_hubs_may_be_in_the_env_file(hub: HubStandIn, start: Callable[..., Server], tmp_path: Path) -> None:
    hub.token = "from-the-file"
    env_file = tmp_path / "env"
    env_file.write_text(f"GLM_MODEL=owner/shapes\nHF_TOKEN=from-the-file\nHF_ENDPOINT={hub.url}\n")
    server = start(GLM_ENV_FILE=str(env_file), HF_ENDPOINT="")

    server.until(lambda health: health["state"] == "idle", LOAD_S)
