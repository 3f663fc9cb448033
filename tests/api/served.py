"""The app around a fake model, called in process, and the parts of requests to it."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from typing import Any

from fake_model import FakeRunner
from PIL import Image
from starlette.testclient import TestClient

from api.app import create_app
from api.engine.engine import Engine
from api.engine.loaded_model import Model
from settings import Settings

KEY = "sk-test-0123456789"


class Served:
    """A running app, its client, and the model and engine behind it."""

    def __init__(self, settings: Settings, model: Model, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.app = create_app(settings, engine)
        self.client = TestClient(self.app, headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False)

    @property
    def runner(self) -> FakeRunner:
        assert isinstance(self.model.runner, FakeRunner)
        return self.model.runner

    def chat(self, content: Any = "hello", **fields: Any):
        return self.client.post("/v1/chat/completions", json=chat_body(content, **fields))

    def stream(self, content: Any = "hello", **fields: Any) -> list[Any]:
        return sse_data(self.chat(content, stream=True, **fields).text)


def wait_for(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s"
        time.sleep(0.005)


def chat_body(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def sse_data(text: str) -> list[Any]:
    """The data of each event: parsed, but for the closing [DONE]."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def image_part(colour: str | tuple[int, ...] = "red", size: tuple[int, int] = (56, 56)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
