"""The real server with the demo model: sampling, grammars and caches as a client sees them."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from ports import free_port
from served import KEY, sse_data, text_part
from server_process import HEADERS, ROOT, WAIT_S, Server

from models.shapes.pictures import draw_shapes

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "blue", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA, "strict": True}}
COUNT = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"color": {"type": "string", "enum": ["red", "blue"]}, "limit": {"type": "integer"}},
            "required": ["color", "limit"],
        },
    },
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def part(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


IMAGE = part(draw_shapes([("red", "circle"), ("blue", "square")], size=(320, 240), seed=1))
ASK = [{"role": "user", "content": [IMAGE, text_part("How many red shapes are there?")]}]
TEXT = [{"role": "user", "content": "What can you do?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    command = [sys.executable, "-m", "api.server", "--model", "models/shapes"]
    made = Server(free_port(), tmp_path_factory.mktemp("demo") / "api.log", command, GLM_SLOTS="4")
    made.until(lambda health: health["state"] == "idle", 300)
    yield made
    made.process.kill()
    made.process.wait(WAIT_S)


def ask(server: Server, messages: Any = ASK, **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 60, **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()


def metrics(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=60).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def message(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]["message"]


@pytest.mark.parametrize("thinks", [True, False])
def test_a_schema_is_enforced_in_every_answer_of_a_batch(thinks: bool, server: Server) -> None:
    options = {"chat_template_kwargs": {"enable_thinking": thinks}, "response_format": JSON, "temperature": 1.5}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        bound = [pool.submit(ask, server, seed=seed, max_tokens=300, **options) for seed in range(5)]
        free = pool.submit(ask, server, TEXT)

    for answer in [future.result() for future in bound]:
        seen = json.loads(message(answer)["content"])
        assert set(seen) == {"color", "count"} and seen["color"] in ("red", "blue", "green") and 0 <= seen["count"] <= 9
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert thinks or "reasoning" not in message(answer)
    assert "{" not in message(free.result())["content"]


def test_json_objects_are_enforced_too(server: Server) -> None:
    answer = ask(server, TEXT, response_format={"type": "json_object"}, max_tokens=300, temperature=0.7, seed=2)

    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(message(answer)["content"]), dict)
    assert message(answer)["content"].startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count"}}])
@pytest.mark.parametrize("seed", range(3))
def test_a_forced_call_matches_the_schema(choice: Any, seed: int, server: Server) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": False, "temperature": 1.5, "seed": seed, "max_tokens": 300}

    answer = ask(server, TEXT, tools=[LOOK, COUNT], **fields)

    [call] = message(answer)["tool_calls"]
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    assert answer["choices"][0]["finish_reason"] == "tool_calls" and message(answer)["content"] is None
    assert name == "count" or (choice == "required" and name == "look")
    if name == "count":
        assert arguments["color"] in ("red", "blue") and isinstance(arguments["limit"], int)


def test_a_forced_call_that_is_cut_off_shows_no_markup(server: Server) -> None:
    answer = ask(server, TEXT, tools=[LOOK, COUNT], tool_choice="required", max_tokens=4)

    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 4
    assert not message(answer)["content"] and "tool_calls" not in message(answer)


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "seed": 4}, {"response_format": JSON}, {"logprobs": True}])
def test_a_stream_equals_the_whole_answer(fields: dict[str, Any], server: Server) -> None:
    whole = ask(server, **fields)["choices"][0]
    body = {"messages": ASK, "max_tokens": 60, "stream": True, **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=300)
    parts = [chunk["choices"][0] for chunk in sse_data(answer.text)[:-1]]

    for name in ("content", "reasoning", "reasoning_content"):
        assert "".join(p["delta"].get(name) or "" for p in parts) == (whole["message"].get(name) or "")
    assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [whole["finish_reason"]]
    if whole["logprobs"]:
        streamed = [token["token"] for p in parts for token in (p["logprobs"] or {}).get("content", [])]
        assert streamed == [token["token"] for token in whole["logprobs"]["content"]]


def test_a_seed_gives_the_same_answer_whatever_else_runs(server: Server) -> None:
    fields = {"temperature": 1.2, "seed": 11, "n": 2, "max_tokens": 40}
    alone = [choice["message"] for choice in ask(server, **fields)["choices"]]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = [pool.submit(ask, server, TEXT, temperature=1.0) for _ in range(5)]
        crowded = [choice["message"] for choice in pool.submit(ask, server, **fields).result()["choices"]]
        concurrent.futures.wait(others)

    assert alone == crowded
    second = ask(server, **{**fields, "n": 1, "seed": 12})["choices"][0]["message"]
    assert second == alone[1]


def test_logprobs_are_those_of_the_tokens(server: Server) -> None:
    answer = ask(server, TEXT, logprobs=True, top_logprobs=3, max_tokens=12)

    tokens = answer["choices"][0]["logprobs"]["content"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    for token in tokens:
        best = token["top_logprobs"]
        assert len(best) == 3 and [t["logprob"] for t in best] == sorted((t["logprob"] for t in best), reverse=True)
        assert token["token"] == best[0]["token"] and token["logprob"] <= 0  # greedy
    text = b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace")
    assert (message(answer).get("reasoning") or message(answer)["content"]).split()[0] in text


def test_reasoning_is_cut_at_its_budget(server: Server) -> None:
    long = ask(server, thinking_token_budget=1000)["usage"]["completion_tokens_details"]["reasoning_tokens"]
    short = ask(server, thinking_token_budget=2)

    assert long > 6
    assert short["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 2 + 3  # and the two tags
    assert message(short)["content"]


def test_length_limits_are_honoured(server: Server) -> None:
    assert ask(server, TEXT, ignore_eos=True, max_tokens=70)["usage"]["completion_tokens"] == 70
    usual = ask(server, TEXT, max_tokens=200)["usage"]["completion_tokens"]
    assert usual < ask(server, TEXT, min_tokens=usual + 5, max_tokens=200)["usage"]["completion_tokens"]


def test_endless_repetition_is_ended_and_reported(server: Server) -> None:
    [token] = httpx.post(f"{server.url}/tokenize", json={"prompt": "x"}, headers=HEADERS, timeout=60).json()["tokens"]

    answer = ask(server, TEXT, logit_bias={str(token): 100}, loop_window=16, max_tokens=500)

    assert answer["choices"][0]["finish_reason"] == "repetition"
    assert answer["usage"]["completion_tokens"] < 100


def test_a_second_question_about_an_image_hits_the_cache(server: Server) -> None:
    image = part(draw_shapes([("green", "star")], size=(320, 240), seed=random.Random(os.getpid()).randrange(10**6)))
    messages = [{"role": "user", "content": [image, text_part("What is it?")]}]
    first = ask(server, messages)["usage"]["prompt_tokens_details"]
    second = ask(server, messages)["usage"]["prompt_tokens_details"]
    other = ask(server, messages, cache_salt="another")["usage"]["prompt_tokens_details"]

    assert first["cached_tokens"] < 20 and other["cached_tokens"] == 0  # the first words of the template at most
    assert second["cached_tokens"] > first["image_tokens"] > 0


def test_the_time_in_the_vision_encoder_is_reported_once_for_an_image(server: Server) -> None:
    image = part(draw_shapes([("red", "star")], size=(320, 240), seed=random.Random(os.getpid()).randrange(10**6)))
    messages = [{"role": "user", "content": [image, text_part("What is it?")]}]
    before = metrics(server)
    first = ask(server, messages)["timings"]
    second = ask(server, [{"role": "user", "content": [image, text_part("What color is it?")]}])["timings"]
    after = metrics(server)

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert 0 < first["vision_s"] <= first["prefill_s"] and second["vision_s"] == 0
    assert grown('glm_request_vision_encode_time_seconds_count{traffic="user"}') == 1
    seconds = grown('glm_request_vision_encode_time_seconds_sum{traffic="user"}')
    assert seconds == pytest.approx(first["vision_s"], abs=1e-6)
    assert grown("glm_prefix_cache_hits_total") > 30 and grown("glm_prefix_cache_queries_total") > 60
    assert grown("glm_mm_cache_queries_total") >= 1 and after["glm_event_loop_lag_seconds"] >= 0


@pytest.mark.parametrize("size", [(1, 1), (27, 27), (1, 30), (199, 1), (3000, 20)])
def test_small_and_narrow_images_are_accepted(size: tuple[int, int], server: Server) -> None:
    answer = ask(server, [{"role": "user", "content": [part(Image.new("RGB", size, "red")), text_part("What?")]}])

    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_the_program_in_the_readme_runs_as_it_is_printed(server: Server, tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    [environment] = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "OPENAI_API_KEY" in block]
    [program] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / ".env").write_text(f"GLM_WEB_TOKEN=other\nGLM_API_KEY={KEY}\n")
    (tmp_path / "web").symlink_to(ROOT / "web")
    (tmp_path / "ask.py").write_text(program)
    script = f"{environment.replace('8080', str(server.port))}\n{sys.executable} ask.py"

    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert (done.returncode, done.stderr) == (0, "")
    assert "blue" in done.stdout.lower()


def test_the_key_is_needed(server: Server) -> None:
    assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": TEXT}, timeout=60).status_code == 401
    assert KEY not in server.log.read_text()
