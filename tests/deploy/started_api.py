"""The real API with the demo model, as a process of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import httpx
from ports import free_port

from models.shapes.pictures import draw_shapes

ROOT = Path(__file__).resolve().parents[2]
KEY, OTHER_KEY, PROBE_TOKEN = "sk-first-0123456789", "sk-second-0123456789", "sk-probe-0123456789"
WAIT_S = 120.0


class StartedApi:
    """Use as a context manager. Its log is `api.log` in the folder, opened for appending as start.sh does."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "api.log"
        self.url = f"http://127.0.0.1:{self.port}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GLM_")}
        self._environment = {
            **kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GLM_API_HOST": "127.0.0.1", "GLM_API_PORT": str(self.port),
            "GLM_API_KEY": KEY, "GLM_API_KEYS": f"second:{OTHER_KEY}", "GLM_PROBE_TOKEN": PROBE_TOKEN,
            "GLM_LOG_DIR": str(folder), **settings,
        }  # fmt: skip

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "api.server", "--model", "models/shapes"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while self._state() != "idle":
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def _state(self) -> str:
        try:
            return str(httpx.get(f"{self.url}/health", timeout=5).json()["state"])
        except httpx.TransportError:
            return "down"


def headers(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def picture_question(**fields: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    draw_shapes([("red", "circle")], seed=1).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the picture?"}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, **fields}


def long_question(tokens: int, **fields: Any) -> dict[str, Any]:
    """Its answer has exactly so many tokens."""
    body = {"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": tokens, "ignore_eos": True}
    return {**body, "temperature": 1.0, "seed": 1, **fields}


def events(answer: httpx.Response) -> list[tuple[float, Any]]:
    """(seconds on the monotonic clock at which it came, data) of each event of an open stream."""
    return [
        (time.monotonic(), json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]")
        for line in answer.iter_lines()
        if line.startswith("data: ")
    ]
