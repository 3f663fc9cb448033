"""The image is built and run for real: asked, hung, cured, stopped, and followed by a second container on the same volumes."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from built_image import USER, Container, Volumes, build
from dotenv import dotenv_values
from hub_stand_in import HubStandIn, files_of
from ports import free_port

from models.shapes.pictures import draw_shapes

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/glm-4.6v-flash-web-tests"
MODEL = "owner/shapes"
CHAT = """
from settings import load
from web.history.chat_store import FILE_NAME, ChatStore
from web.history.conversation import Conversation
store = ChatStore(load().log_dir / FILE_NAME, keep_days=90)
"""
SAVE = CHAT + "chat = Conversation('ab' * 16); chat.ask('Is this kept?', []); store.save('a visitor', chat)"
SHOW = CHAT + "print([chat.title for chat in store.summaries('a visitor')])"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and chroot need root")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    return Volumes(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    stand_in = HubStandIn(files_of(ROOT / "models" / "shapes"))
    yield stand_in
    stand_in.close()


@pytest.fixture(scope="module")
def variables(hub: HubStandIn) -> dict[str, str]:
    """A chroot has the ports and the loopback interface of this machine."""
    return {
        "GLM_API_HOST": "127.0.0.1", "GLM_WEB_HOST": "127.0.0.1", "GLM_API_PORT": str(free_port()), "GLM_WEB_PORT": str(free_port()),
        "GLM_MODEL": MODEL, "HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url, "GLM_CHECK_PERIOD_S": "5", "GLM_BEAT_LIMIT_S": "15",
        "GLM_START_TIMEOUT_S": "300", "OMP_NUM_THREADS": "1", "TINI_SUBREAPER": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def container(volumes: Volumes, variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    build(IMAGE, tmp_path_factory.mktemp("build"))
    container = Container(IMAGE, volumes, **variables)
    try:
        container.until(lambda: container.state() in ("idle", "busy"))
        yield container
    finally:
        container.remove()


def key_of(volumes: Volumes) -> str:
    return dotenv_values(volumes.folder / "keys" / ".env")["GLM_API_KEY"] or ""


def color_of_a_circle(container: Container, key: str, color: str) -> str:
    """Asked about a picture of one circle of this color."""
    picture = io.BytesIO()
    draw_shapes([(color, "circle")], seed=11).save(picture, format="PNG")
    headers = {"Authorization": f"Bearer {key}"}
    model = httpx.get(f"{container.url}/v1/models", headers=headers, timeout=60).json()["data"][0]["id"]
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What color is the shape?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    answer = httpx.post(f"{container.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"]).lower()


# The tests below run in this order: one life of two containers.


def test_it_serves_as_a_user_who_can_write_nowhere_else(container, volumes):
    container.until(lambda: container.health() == "healthy")

    assert "red" in color_of_a_circle(container, key_of(volumes), "red")
    assert "blue" in color_of_a_circle(container, key_of(volumes), "blue")
    keys = (volumes.folder / "keys" / ".env").stat()
    assert (keys.st_uid, keys.st_mode & 0o777) == (USER, 0o600)
    names = {" ".join(process.cmdline()[1:]) for process in container.processes()}
    assert {"-m api.server", "-m web.server", "health_check.py loop"} <= names, "none of them is of another user"
    doctor = container.execute("/app/.venv/bin/python", "/app/health_check.py", "doctor")
    assert "a loop runs the checker" in doctor.stdout and "FAIL" not in doctor.stdout, doctor.stdout
    assert container.written() == [], "all that is written lies in the volumes or /tmp, so that the root may be read-only"


def test_no_file_of_this_machine_is_in_the_image(container):
    found = container.execute("find", "/app", "-maxdepth", "1", "-printf", "%f ").stdout.split()

    assert {"api", "web", "monitor", "deploy", ".venv", "start.sh"} <= set(found)
    assert not {".env", ".git", ".venv-clients", "tests", "docs", "bench"} & set(found)
    owned = container.execute("find", "/app", "-user", str(USER), "-prune", "-print").stdout.split()
    assert sorted(owned) == ["/app/keys", "/app/logs", "/app/weights"]


def test_a_hung_api_is_cured_and_the_container_lives(container, volumes):
    assert container.execute("/app/.venv/bin/python", "-c", SAVE).returncode == 0
    hung = volumes.pid("api")

    os.kill(hung, signal.SIGSTOP)
    container.until(lambda: container.health() != "healthy")
    container.until(lambda: volumes.pid("api") != hung and container.state() in ("idle", "busy"))

    container.until(lambda: container.health() == "healthy")
    assert not psutil.pid_exists(hung)
    assert "green" in color_of_a_circle(container, key_of(volumes), "green")


def test_a_stop_ends_everything(container):
    began = time.monotonic()

    assert container.stop() == 0

    assert time.monotonic() - began < 40, "compose.yaml allows so many seconds"
    while left := container.processes():
        assert time.monotonic() - began < 100, left
        time.sleep(0.2)
    assert "The API is stopped" in container.shown()


def test_a_second_container_keeps_keys_chats_history_and_weights(container, volumes, variables, hub):
    key, asked = key_of(volumes), len(hub.asked)
    hub.close()
    second = Container(IMAGE, volumes, **variables)
    try:
        second.until(lambda: second.state() in ("idle", "busy"))

        assert key_of(volumes) == key
        assert "red" in color_of_a_circle(second, key, "red")
        assert second.execute("/app/.venv/bin/python", "-c", SHOW).stdout.strip() == "['Is this kept?']"
        history = json.loads(second.execute("/app/.venv/bin/python", "/app/health_check.py", "history", "--json").stdout)
        assert ("api", "restart", "checker", "done") in [(act["target"], act["kind"], act["actor"], act["outcome"]) for act in history["actions"]]
        assert len(hub.asked) == asked > 0, "the weights came from the volume"
        second.until(lambda: second.health() == "healthy")
        assert second.stop() == 0
    finally:
        second.remove()
