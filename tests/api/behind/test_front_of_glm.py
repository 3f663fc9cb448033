"""The API in front of another one of its kind, with the demo model: answers equal those of the engine asked directly."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ports import free_port
from served import sse_data, text_part
from server_process import HEADERS, ROOT, WAIT_S, Server

from models.shapes.pictures import draw_shapes

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA, "strict": True}}
COUNT = {"type": "function", "function": {"name": "count", "parameters": {**SCHEMA, "required": ["color"]}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def shapes() -> dict[str, Any]:
    buffer = io.BytesIO()
    draw_shapes([("red", "circle"), ("blue", "square")], size=(320, 240), seed=1).save(buffer, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}}


IMAGE = shapes()
ASK = [{"role": "user", "content": [IMAGE, text_part("How many red shapes are there?")]}]
TEXT = [{"role": "user", "content": "What can you do?"}]
# Of their own in each answer, or measured.
OWN = ("id", "created", "created_at", "completed_at", "request_id", "timings", "item_id", "response_id", "call_id")


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """(the engine, the API in front of it)"""
    folder = tmp_path_factory.mktemp("front")
    command = [sys.executable, "-m", "api.server"]
    engine = Server(free_port(), folder / "engine.log", [*command, "--model", "models/shapes"], GLM_SLOTS="4", GLM_LOG_DIR=str(folder / "engine"))
    front = Server(free_port(), folder / "front.log", command, GLM_ENGINE_URL=engine.url, GLM_ENGINE_KEY=HEADERS["Authorization"].split()[1], GLM_LOG_DIR=str(folder / "front"))
    yield engine, front
    for server in (front, engine):
        server.process.kill()
        server.process.wait(WAIT_S)


@pytest.fixture(scope="module")
def ready(servers) -> tuple[Server, Server]:
    for server in servers:
        server.until(lambda health: health["state"] == "idle", 300)
    return servers


def test_the_front_is_up_before_its_engine_and_says_why_it_waits(servers) -> None:
    health = servers[1].until(lambda health: health["state"] == "loading" and "has not been asked" not in health["reason"], 120)

    assert health["reason"].startswith(f"the engine behind at {servers[0].url} is not ready: ")


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    answer = httpx.post(f"{server.url}{path}", json=body, headers=HEADERS, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer


def bare(value: Any) -> Any:
    """Without what is of its own in each answer."""
    if isinstance(value, dict):
        # What the prefix cache held depends on what was asked before.
        value = {k: v for k, v in value.items() if k not in (*OWN, "cached_tokens", "cache_read_input_tokens")}
        if "input_tokens" in value and "cache_creation_input_tokens" in value:
            del value["input_tokens"]
        return {k: bare(v) for k, v in value.items()}
    return [bare(item) for item in value] if isinstance(value, list) else value


QUESTIONS: dict[str, dict[str, Any]] = {
    "text": {"messages": TEXT},
    "picture": {"messages": ASK},
    "box": {"messages": [{"role": "user", "content": [IMAGE, text_part("Where is the blue square?")]}]},
    "no thought": {"messages": ASK, "chat_template_kwargs": {"enable_thinking": False}},
    "short thought": {"messages": ASK, "reasoning_effort": "minimal"},
    "schema": {"messages": ASK, "response_format": JSON, "temperature": 0.8, "seed": 3},
    "call": {"messages": TEXT, "tools": [LOOK, COUNT], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.1, "seed": 2},
    "choices": {"messages": TEXT, "n": 2, "temperature": 1.0, "seed": 5},
    "logprobs": {"messages": TEXT, "logprobs": True, "top_logprobs": 2, "max_tokens": 8},
    "cut": {"messages": ASK, "max_tokens": 3},
    "stop": {"messages": TEXT, "stop": ["a"]},
    "tags": {"messages": [{"role": "user", "content": [IMAGE, text_part("Where is the blue square?")]}], "skip_special_tokens": False},
    "inline": {"messages": ASK, "separate_reasoning": False},
    "continued": {"messages": [*TEXT, {"role": "assistant", "content": "I can"}], "continue_final_message": True, "add_generation_prompt": False},
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_answer_equals_that_of_the_engine_asked_directly(name, ready) -> None:
    body = {"max_tokens": 120, **QUESTIONS[name]}

    direct, fronted = (post(server, "/v1/chat/completions", body).json() for server in ready)

    assert bare(fronted) == bare(direct)
    assert set(fronted["timings"]) == set(direct["timings"]) and fronted["timings"]["ttft_s"] > 0


def joined(events: list[Any]) -> dict[str, Any]:
    """What the chunks of a stream add up to."""
    out: dict[str, Any] = {"boxes": [], "calls": [], "reasons": [], "usage": events[-2]["usage"], "last": events[-1]}
    for event in events[:-1]:
        for choice in event["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning"):
                out[f"{choice['index']} {name}"] = out.get(f"{choice['index']} {name}", "") + (delta.get(name) or "")
            out["boxes"] += delta.get("boxes", [])
            out["calls"] += [call["function"] for call in delta.get("tool_calls", [])]
            out["reasons"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return bare(out)


@pytest.mark.parametrize("name", ["picture", "box", "schema", "call", "choices"])
def test_a_stream_equals_that_of_the_engine_asked_directly(name, ready) -> None:
    body = {"max_tokens": 120, "stream": True, "stream_options": {"include_usage": True}, **QUESTIONS[name]}

    direct, fronted = (joined(sse_data(post(server, "/v1/chat/completions", body).text)) for server in ready)

    assert fronted == direct


OTHER_WIRES = {
    "messages": ("/v1/messages", {"max_tokens": 60, "messages": [{"role": "user", "content": "What can you do?"}]}),
    "responses": ("/v1/responses", {"input": "What can you do?", "max_output_tokens": 60}),
    "completions": ("/v1/completions", {"prompt": ["The red", "A blue"], "n": 2, "seed": 4, "max_tokens": 12, "temperature": 0.7}),
    "ids": ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 6, "logprobs": 2, "echo": False}),
}


@pytest.mark.parametrize("name", OTHER_WIRES)
def test_the_other_wires_answer_as_the_engine_does(name, ready) -> None:
    path, body = OTHER_WIRES[name]

    direct, fronted = (post(server, path, body).json() for server in ready)
    streams = [post(server, path, {**body, "stream": True}).text for server in ready]

    assert bare(fronted) == bare(direct)
    kinds = [{line for line in text.splitlines() if line.startswith("event:")} for text in streams]
    assert kinds[0] == kinds[1]


def test_tokens_come_from_the_engines_tokenizer(ready) -> None:
    conversation = {"messages": [{"role": "user", "content": "red and blue"}], "return_token_strs": True}
    count = {"messages": ASK, "max_tokens": 5}
    anthropic = {"messages": [{"role": "user", "content": "red and blue"}]}
    for path, body in (("/tokenize", {"prompt": "red and blue"}), ("/tokenize", conversation), ("/detokenize", {"tokens": [5, 6, 7]}), ("/v1/messages/count_tokens", anthropic)):
        direct, fronted = (post(server, path, body).json() for server in ready)
        assert fronted == direct
    prompt = post(ready[0], "/v1/chat/completions", count).json()["usage"]["prompt_tokens"]
    assert post(ready[1], "/v1/chat/completions", count).json()["usage"]["prompt_tokens"] == prompt


def test_what_the_engine_refuses_is_refused_with_its_reason(ready) -> None:
    long = {"messages": [{"role": "user", "content": "red " * 20_000}]}

    direct, fronted = (httpx.post(f"{server.url}/v1/chat/completions", json=long, headers=HEADERS, timeout=300) for server in ready)

    assert direct.status_code == fronted.status_code == 400
    assert fronted.json()["error"]["code"] == direct.json()["error"]["code"] == "context_length_exceeded"


def test_the_facts_of_the_engine_are_shown(ready) -> None:
    direct, fronted = (httpx.get(f"{server.url}/info", headers=HEADERS, timeout=60).json() for server in ready)

    assert fronted["demo"] is True and fronted["knows"] == direct["knows"] and fronted["context_tokens"] == direct["context_tokens"]
    assert fronted["engine"]["kind"] == "glm"
    text = httpx.get(f"{ready[1].url}/metrics", headers=HEADERS, timeout=60).text
    assert "glm_generation_tokens_total" in text and "glm_cache_config_info" not in text


def test_the_front_loads_no_library_of_tensors() -> None:
    program = "import api.server, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert json.loads(done.stdout.replace("'", '"')) == []
