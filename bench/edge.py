"""python -m bench.edge: how many streamed tokens a second the server passes on when the model costs nothing.

The real server, its engine and its sockets, around a runner that samples one fixed token a row, at once or after a sleep
that stands for a device at work. The client is a process of its own that reads bytes and parses nothing. Shows what the
HTTP side takes from a quick card.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

import settings
from api.engine.engine import Engine
from api.engine.kv_cache import Copy
from api.engine.loaded_model import Capacity, Model, SampledToken
from api.engine.request import ImageInput
from api.engine.scheduler import Batch, EncodeTask, Packing
from api.engine.sequence import Sequence
from api.engine.text.tokenizer import Vocabulary
from api.server import serve
from bench.checkpoint import words
from models.shapes.checkpoint import FOLDER as SHAPES

STREAMS = (1, 4, 16, 64)
PORT = 8971
KEY = "bench-edge"
ROOT = Path(__file__).resolve().parents[1]


class FixedRunner:
    """Samples one word of a list for every row, `step_s` after it was asked."""

    overlaps = False
    free_rows = 12
    packing = Packing()

    def __init__(self, tokens: list[int], step_s: float) -> None:
        self._tokens, self._step_s = tokens, step_s
        self._random = random.Random(46)  # an answer that repeats itself would be ended

    def warm_up(self) -> None: ...

    def prepare_next(self) -> bool:
        return False

    def close(self) -> None: ...

    def encode(self, task: EncodeTask, limit_s: float) -> list[Any]:
        return list(task.images)

    def size_bytes(self, features: Any) -> int:
        return 1

    def copy_pages(self, copies: list[Copy]) -> None: ...

    def clear_pages(self, pages: list[int]) -> None: ...

    def begin(self, sequence: Sequence) -> None: ...

    def compute(self, batch: Batch) -> list[SampledToken]:
        if self._step_s:
            time.sleep(self._step_s)
        return self._sampled(len(batch.sampled))

    def _sampled(self, rows: int) -> list[SampledToken]:
        return [SampledToken(self._random.choice(self._tokens))] * rows

    def failure(self, error: BaseException) -> Literal["request", "memory", "device"]:
        return "request"


class PlainTemplate:
    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, enable_thinking: bool) -> str:
        return "".join(str(message["content"]) for message in messages) + "<|assistant|>\n<think></think>"


class NoImages:
    settings_key = b""

    def count_bytes(self, width: int, height: int) -> int:
        return 0

    def count_tokens(self, width: int, height: int) -> int:
        return 1

    def process(self, image: Any) -> ImageInput:
        raise ValueError("no images here")


class QueuedRunner(FixedRunner):
    """The same as a device that computes while the host goes on: steps are queued, and waited for."""

    overlaps = True

    def __init__(self, tokens: list[int], step_s: float) -> None:
        super().__init__(tokens, step_s)
        self.costs: list[tuple[int, int, float]] = []
        self._free_at = 0.0

    def launch(self, batch: Batch) -> _Flight:
        return self._queued(len(batch.sampled))

    def launch_next(self, flight: _Flight, sequences: tuple[Sequence, ...]) -> _Flight:
        return self._queued(len(sequences))

    def collect(self, flight: _Flight) -> list[SampledToken]:
        self.settle(flight)
        return self._sampled(flight.rows)

    def settle(self, flight: _Flight) -> None:
        left_s = flight.ready_at - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)

    def wait_for_slices(self) -> None: ...

    def _queued(self, rows: int) -> _Flight:
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s
        return _Flight(rows, self._free_at, self._step_s)


class _Flight:
    def __init__(self, rows: int, ready_at: float, seconds: float) -> None:
        self.rows, self.ready_at, self.seconds = rows, ready_at, seconds


def model(step_s: float, queued: bool) -> Model:
    vocabulary = Vocabulary(Tokenizer.from_file(str(SHAPES / "tokenizer.json")))
    runner = (QueuedRunner if queued else FixedRunner)(sorted(words().values()), step_s)
    capacity = Capacity(slots=64, pages=64 * 160, page_tokens=16, chunk_tokens=512, encoder_cache_bytes=2**20)
    return Model("edge", runner, vocabulary, PlainTemplate(), NoImages(), frozenset(), 2048, capacity)


def server(step_s: float, queued: bool, port: int) -> int:
    os.environ |= {"GLM_API_KEY": KEY, "GLM_API_PORT": str(port), "GLM_API_HOST": "127.0.0.1", "GLM_LOG_LEVEL": "warning"}
    loaded = settings.load()
    return serve(loaded, Engine(lambda progress: model(step_s, queued), loaded.queue_size))


def measure(port: int, streams: int, tokens: int) -> dict[str, float]:
    """Streams that start together; the rate from the first answer's first token to the last."""
    body = json.dumps({
        "messages": [{"role": "user", "content": "red"}], "max_tokens": tokens, "stream": True, "temperature": 0,
        "stream_options": {"include_usage": True}, "repetition_penalty": 1,
    }).encode()  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: edge\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    selector, texts = selectors.DefaultSelector(), {}
    for _ in range(streams):
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(head.encode() + body)
        one.setblocking(False)
        texts[one] = bytearray()
        selector.register(one, selectors.EVENT_READ)
    first, ended, events = 0.0, 0, 0
    while ended < streams:
        for key, _ in selector.select(timeout=30):
            one = key.fileobj
            data = one.recv(2**18)
            text = texts[one]
            text += data
            if not first and b'"content"' in data:
                first = time.perf_counter()
            if b"[DONE]" in text[-64:] or not data:
                ended += 1
                events += text.count(b'"content":')
                selector.unregister(one)
                one.close()
                used = json.loads(text[text.rindex(b'"usage":') + 8 : text.rindex(b"}")])
                assert used["completion_tokens"] == tokens, used
    took_s = time.perf_counter() - first
    return {"tokens_s": streams * tokens / took_s, "tokens_an_event": streams * tokens / max(events, 1)}


def run(step_ms: float, queued: bool, tokens: int, port: int, streams: tuple[int, ...]) -> None:
    command = [sys.executable, "-m", "bench.edge", "--serve", "--step-ms", str(step_ms), "--port", str(port)]
    child = subprocess.Popen(command + ["--queued"] * queued, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        _wait(port)
        measure(port, 4, 64)
        for count in streams:
            before_s = cpu_s(child.pid)
            figures = measure(port, count, tokens)
            cost = (cpu_s(child.pid) - before_s) / (count * tokens) * 1e6
            possible = count / step_ms * 1000 if step_ms else None
            share = f" of {possible:.0f} possible: {figures['tokens_s'] / possible:.0%}" if possible else ""
            print(
                f"{'queued' if queued else 'waiting'} step {step_ms:g} ms, {count:2d} streams: {figures['tokens_s']:.0f} tokens/s{share}, "
                f"{figures['tokens_an_event']:.2f} tokens an event, {cost:.0f} us of processor time a token",
                flush=True,
            )  # fmt: skip
    finally:
        child.terminate()
        child.wait(10)


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait(port: int) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server does not answer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.edge", description=__doc__.splitlines()[0])
    parser.add_argument("--step-ms", type=float, action="append", help="time of a step; default: 0, then 5")
    parser.add_argument("--tokens", type=int, default=400, help="of each answer")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--queued", action="store_true", help="a device that computes while the host goes on")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    steps = given.step_ms or [0.0, 5.0]
    if given.serve:
        return server(steps[0] / 1000, given.queued, given.port)
    for step_ms in steps:
        run(step_ms, given.queued, given.tokens, given.port, tuple(given.streams))
    return 0


if __name__ == "__main__":
    sys.exit(main())
