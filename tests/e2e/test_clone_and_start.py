"""The way of a newcomer: clone, ./start.sh, ask about pictures, check, ./stop.sh, and nothing is left behind.

Everything is real: the installation into .venv, both servers, the bundled model, the `openai` client.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from dotenv import dotenv_values
from openai import AuthenticationError, OpenAI
from PIL import Image
from ports import free_port

from models.shapes.pictures import COLORS, draw_shapes

ROOT = Path(__file__).resolve().parents[2]
SIX_KEYS = ["timestamp", "gpu_load", "gpu_memory_used", "cpu_percent", "memory_used_percent", "service_healthy"]
START_LIMIT_S = 1200
SECRETS = ("GLM_API_KEY", "GLM_WEB_TOKEN")


class Clone:
    """A fresh clone and the environment of someone who has nothing but Python."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        self.folder = folder
        self.api_port, self.web_port = ports
        unwanted = ("GLM_", "CONDA", "VIRTUAL_ENV", "PYTHON")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        self.env |= {
            "GLM_API_PORT": str(self.api_port),
            "GLM_WEB_PORT": str(self.web_port),
            "GLM_START_TIMEOUT_S": "300",
        }

    def run(self, *command: str, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
        # Files, not pipes: a server that kept a pipe open would make the test hang instead of fail.
        out, err = self.folder.parent / "out.txt", self.folder.parent / "err.txt"
        with out.open("w") as stdout, err.open("w") as stderr:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=limit_s,
            )
        return subprocess.CompletedProcess(command, done.returncode, out.read_text(), err.read_text())

    def secret(self, name: str) -> str:
        return dotenv_values(self.folder / ".env")[name] or ""

    def client(self, key: str | None = None) -> OpenAI:
        url = f"http://127.0.0.1:{self.api_port}/v1"
        return OpenAI(base_url=url, api_key=key or self.secret("GLM_API_KEY"), max_retries=0, timeout=120)

    def ask(self, picture: Image.Image, question: str) -> str:
        client = self.client()
        reply = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": [image_part(picture), {"type": "text", "text": question}]}],
            temperature=0,
            max_tokens=100,
        )
        return (reply.choices[0].message.content or "").lower()

    def left_processes(self) -> list[str]:
        """Whatever still works in the clone's folder."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and Path(os.readlink(process / "cwd")).is_relative_to(self.folder):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def left_files(self) -> set[str]:
        """What git does not know, without the three places that a start may write to."""
        status = self.run("git", "status", "--porcelain", "-z", "--ignored", "--untracked-files=all").stdout
        paths = {entry[3:] for entry in status.split("\0") if entry}
        return {path for path in paths if path != ".env" and not path.startswith((".venv/", "logs/"))}


def image_part(picture: Image.Image) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def named_colors(answer: str) -> set[str]:
    return {color for color in COLORS if re.search(rf"\b{color}\b", answer)}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("newcomer") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True, timeout=300)
    clone = Clone(folder, (free_port(), free_port()))
    started = clone.run("./start.sh", limit_s=START_LIMIT_S)
    assert started.returncode == 0, started.stdout[-4000:] + started.stderr[-4000:]
    clone.first_start = started.stdout
    yield clone
    clone.run("./stop.sh")


# The tests below run in this order: one life of one service.


def test_first_start_prints_the_addresses_and_the_secrets_it_made(clone):
    shown = clone.first_start

    assert f"http://127.0.0.1:{clone.api_port}/v1" in shown
    assert f"http://127.0.0.1:{clone.web_port}/?token={clone.secret('GLM_WEB_TOKEN')}" in shown
    assert all(f"{name}={clone.secret(name)}" in shown for name in SECRETS)
    assert (clone.folder / ".env").stat().st_mode & 0o777 == 0o600


def test_page_answers_at_the_printed_link(clone):
    link = re.search(r"^Page: +(\S+)$", clone.first_start, re.MULTILINE).group(1)

    reply = requests.get(link, timeout=60)

    assert reply.status_code == 200
    assert "<html" in reply.text.lower()


def test_api_is_closed_without_the_key(clone):
    with pytest.raises(AuthenticationError):
        clone.client(key="not-the-key").models.list()

    assert requests.get(f"http://127.0.0.1:{clone.api_port}/health", timeout=60).json()["state"] in ("idle", "busy")


def test_same_question_about_two_pictures_gets_two_right_answers_and_a_blank_neither(clone):
    question = "What color is the shape?"

    answers = {color: clone.ask(draw_shapes([(color, "circle")], seed=11), question) for color in ("red", "blue")}
    blank = clone.ask(draw_shapes([], seed=11), question)

    assert {color: named_colors(answer) for color, answer in answers.items()} == {"red": {"red"}, "blue": {"blue"}}
    assert not named_colors(blank), blank


def test_shapes_are_counted(clone):
    picture = draw_shapes([("green", "square"), ("purple", "star"), ("black", "circle")], seed=12)

    answer = clone.ask(picture, "How many shapes are there?")

    assert re.search(r"\b(3|three)\b", answer), answer


def test_health_check_finds_it_healthy(clone):
    # With an empty environment, as cron has it: the ports then come from .env.
    with (clone.folder / ".env").open("a") as env_file:
        env_file.write(f"GLM_API_PORT={clone.api_port}\nGLM_WEB_PORT={clone.web_port}\n")

    done = clone.run("env", "-i", ".venv/bin/python", "health_check.py")

    printed = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert list(printed)[:6] == SIX_KEYS
    assert printed["service_healthy"] is True
    assert json.loads((clone.folder / "logs" / "health.json").read_text()) == printed


def test_second_start_says_that_it_runs(clone):
    again = clone.run("./start.sh", limit_s=START_LIMIT_S)

    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Already running") == 2
    assert "Installing" not in again.stdout
    assert clone.secret("GLM_API_KEY") not in again.stdout


def test_stop_leaves_no_process_no_port_and_no_stray_file(clone):
    assert len(clone.left_processes()) >= 2

    stopped = clone.run("./stop.sh")

    assert stopped.returncode == 0, stopped.stderr
    assert clone.left_processes() == []
    for port in (clone.api_port, clone.web_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert clone.left_files() == set()
    assert not list((clone.folder / "logs").glob("*.pid.json"))


def test_health_check_finds_it_dead_afterwards(clone):
    done = clone.run(".venv/bin/python", "health_check.py")

    assert done.returncode == 1
    assert json.loads(done.stdout)["verdict"] == "dead"
