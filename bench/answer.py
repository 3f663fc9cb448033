"""python -m bench.answer: where the milliseconds of a one-token picture answer go, from the first byte in to the last byte out.

The demo model, or another one, serves in this process, so that client and server share a clock; each picture is new to its
caches. A stage is the time inside one function of the server; what lies between stages is `between`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import io
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import uvicorn
from PIL import Image

import api.http.connection as connection
import api.protocol.schemas as schemas
import api.requests.prompt as prompt
import api.routes.chat as chat
from api.app import create_app
from api.engine.config import EngineConfig
from api.engine.engine import Engine
from api.engine.loading.loader import load
from api.server import bind
from bench.report import percentile
from settings import ROOT, Settings

KEY = "bench"
# Stages in the order of a request: what is timed, and where it is looked up.
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("body", chat, "read_body"),
    ("JSON", schemas, "parse_object"),
    ("fields", schemas, "check_chat"),
    ("base64", prompt, "read_data_url"),
    ("image header", prompt, "open_image"),
    ("template, tokens", prompt, "rendered_ids"),
    ("image decode", prompt, "decode"),
    ("image resize, patches, hash", prompt, "_with_key"),
)


class Clock:
    """Seconds spent in each stage of the request that is under way."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.route_at = 0.0

    def wrap(self, stage: str, owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.seconds[stage] += time.perf_counter() - began

        @functools.wraps(inner)
        async def timed_async(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            if stage == "body":
                self.route_at = began
            try:
                return await inner(*arguments, **named)
            finally:
                self.seconds[stage] += time.perf_counter() - began

        setattr(owner, name, timed_async if asyncio.iscoroutinefunction(inner) else timed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.answer", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/shapes")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--size", default="640x480", help="of the picture, in pixels")
    parser.add_argument("--format", default="JPEG", choices=["JPEG", "PNG"])
    given = parser.parse_args(arguments)
    width, height = map(int, given.size.split("x"))
    clock = Clock()
    for stage, owner, name in STAGES:
        clock.wrap(stage, owner, name)
    port, engine, stop = _serve(given.model, clock)
    try:
        rows = [_ask(port, _picture(width, height, given.format, seed), clock) for seed in range(given.requests + 5)][5:]
    finally:
        stop()
    print(report(rows, f"{given.size} {given.format}, {engine.model.id if engine.model else given.model}"))
    return 0


def report(rows: list[dict[str, float]], title: str) -> str:
    """A Markdown table in milliseconds, in the order of a request: the fastest tenth, which other load disturbs least."""
    total = percentile([row["all"] for row in rows], 0.1) or 1.0
    heads = [f"stage ({title}, {len(rows)} requests)", "fastest tenth, ms", "share", "median, ms"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | --- | --- |"]
    for stage in rows[0]:
        values = [row[stage] for row in rows]
        fast = percentile(values, 0.1) or 0.0
        lines.append(f"| {stage} | {1000 * fast:.2f} | {fast / total:.0%} | {1000 * median(values):.2f} |")
    return "\n".join(lines)


def _serve(model: str, clock: Clock) -> tuple[int, Engine, Callable[[], None]]:
    config = EngineConfig(root=ROOT, model=model, device="cpu", kernels="torch", threads=1, slots=2)
    settings = Settings(api_key=KEY, api_host="127.0.0.1", api_port=_free_port(), log_dir=Path(tempfile.mkdtemp()))
    engine = Engine(lambda progress: _with_timed_processor(load(config, progress), clock), settings.queue_size)
    options = uvicorn.Config(
        create_app(settings, engine), host="127.0.0.1", port=settings.api_port, http=connection.Connection, log_level="warning"
    )
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bind(options)]}, daemon=True)
    thread.start()
    while engine.stats().state != "idle":
        time.sleep(0.05)

    def stop() -> None:
        server.should_exit = True
        thread.join(10)

    return settings.api_port, engine, stop


def _with_timed_processor(model: Any, clock: Clock) -> Any:
    clock.wrap("image resize, patches, hash", model.image_processor, "process")
    return model


def _ask(port: int, picture: str, clock: Clock) -> dict[str, float]:
    """Seconds by stage of one streamed question, on a connection that is kept from a request before it."""
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 1, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _exchange(client, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"}")
        clock.seconds.clear()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        answer = _exchange(client, head.encode() + body, b"0\r\n\r\n")
        total = time.perf_counter() - began
    chunks = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
    timings = next(chunk["timings"] for chunk in chunks if "timings" in chunk)
    stages = {stage: clock.seconds[stage] for stage, _, _ in STAGES}
    row = {"socket, head, middleware": clock.route_at - began, **stages}
    row |= {
        "queue": timings["queue_s"],
        "vision": timings["vision_s"],
        "prefill, first token": timings["prefill_s"] - timings["vision_s"],
    }
    row["between, SSE, socket"] = total - sum(row.values())
    return {**row, "all": total}


def _exchange(client: socket.socket, request: bytes, ending: bytes) -> bytes:
    client.sendall(request)
    answer = b""
    while not answer.endswith(ending):
        piece = client.recv(65536)
        if not piece:
            raise ConnectionError(answer[:300])
        answer += piece
    return answer


def _picture(width: int, height: int, kind: str, seed: int) -> str:
    """A `data:` URL of shapes that no cache has seen."""
    source = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(source.randrange(256) for _ in range(3)))
    for _ in range(30):
        x, y = source.randrange(width), source.randrange(height)
        image.paste(tuple(source.randrange(256) for _ in range(3)), (x, y, x + width // 5, y + height // 5))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
