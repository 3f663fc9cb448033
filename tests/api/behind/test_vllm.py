"""The API in front of vLLM, where it is installed (conftest.py): real questions to the demo model, served by vLLM on the CPU.

    TEST_VLLM=/path/to/bin/vllm python -m pytest tests/api/behind/test_vllm.py

vLLM's CPU build takes two to five minutes to start.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ports import free_port
from served import chat_body, text_part, wait_for
from server_process import HEADERS, ROOT, WAIT_S, Server

from models.shapes.pictures import draw_shapes

KEY = "sk-of-vllm"
START_S = 900.0
PLAIN = {"temperature": 0, "max_tokens": 100}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """(the API in front of vLLM, the address of vLLM)"""
    folder = tmp_path_factory.mktemp("vllm")
    program = os.environ.get("TEST_VLLM") or shutil.which("vllm")
    assert program is not None
    port = free_port()
    command = [
        program, "serve", str(ROOT / "models" / "shapes"), "--served-model-name", "shapes", "--dtype", "float32", "--max-model-len", "2048",
        "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--limit-mm-per-prompt", '{"image":4,"video":0}',
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    environment["PATH"] = f"{Path(program).parent}:{os.environ['PATH']}"
    vllm = Server(port, folder / "vllm.log", command, **environment)
    server = Server(
        free_port(), folder / "front.log", [sys.executable, "-m", "api.server"], GLM_ENGINE_URL=f"http://127.0.0.1:{port}",
        GLM_ENGINE_KEY=KEY, GLM_LOG_DIR=str(folder / "logs"),
    )  # fmt: skip
    try:
        server.until(lambda health: health["state"] == "idle", START_S)
        yield server, vllm.url
    finally:
        for one in (server, vllm):
            one.process.terminate()
            one.process.wait(WAIT_S)


def picture() -> dict[str, Any]:
    buffer = io.BytesIO()
    draw_shapes([("red", "circle"), ("blue", "square")], size=(320, 240), seed=1).save(buffer, "WEBP", lossless=True)
    return {"type": "image_url", "image_url": {"url": "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()}}


def message(server: Server, content: Any, **fields: Any) -> dict[str, Any]:
    answer = server.post(chat_body(content, **{**PLAIN, **fields}), timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def test_it_is_known_as_vllm_with_its_limits(front) -> None:
    info = httpx.get(f"{front[0].url}/info", headers=HEADERS, timeout=60).json()

    assert info["engine"]["kind"] == "vllm" and info["engine"]["version"] and (info["model"], info["context_tokens"]) == ("shapes", 2048)


def test_thoughts_are_separated_and_boxes_found(front) -> None:
    said = message(front[0], "What can you do?")
    where = message(front[0], [picture(), text_part("Where is the blue square?")])

    assert "demo model" in said["content"] and said["reasoning"] and "<think>" not in said["content"]
    [box] = where["boxes"]
    assert box["bbox_2d"][0] > 400 and "<|begin_of_box|>" not in where["content"]


def test_fields_are_honoured_or_refused_by_name(front) -> None:
    chosen = message(front[0], "Which?", regex="(red|blue) [0-9]", chat_template_kwargs={"enable_thinking": False})
    refused = front[0].post(chat_body(loop_window=32))

    assert chosen["content"].split()[0] in ("red", "blue")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "loop_window")


def test_too_long_a_prompt_is_refused_as_such(front) -> None:
    answer = front[0].post(chat_body("red " * 5000), timeout=300)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_the_other_wires_and_the_tokenizer(front) -> None:
    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(f"{front[0].url}{path}", json=body, headers=HEADERS, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    messages = [{"role": "user", "content": "What can you do?"}]
    stopped = post("/v1/messages", {"messages": messages, "max_tokens": 60, "stop_sequences": ["demo"]})
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "demo")
    assert post("/v1/responses", {"input": "What can you do?", "max_output_tokens": 90})["output"][-1]["content"][0]["text"]
    assert post("/v1/completions", {"prompt": "The red", "max_tokens": 4})["usage"]["completion_tokens"] == 4
    tokens = post("/tokenize", {"prompt": "red circle"})["tokens"]
    assert post("/detokenize", {"tokens": tokens})["prompt"] == "red circle"


def test_a_client_that_leaves_frees_the_engine(front) -> None:
    server, url = front
    body = chat_body(ignore_eos=True, max_tokens=2000, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=300) as answer:
        next(answer.iter_bytes())

    def idle() -> bool:
        lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        return [line.rsplit(" ", 1)[1] for line in lines if line.startswith("vllm:num_requests_running")] == ["0.0"]

    wait_for(idle)
    server.until(lambda health: health["state"] == "idle")
