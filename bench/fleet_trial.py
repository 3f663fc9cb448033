"""python -m bench.fleet_trial: two real replicas behind nginx, beside the simulation of bench/fleet.py with their own times.

Each round plays the same chats through nginx with each routing, by turns. Before and after each of them is measured what a
replica of the demo model takes for prompts, pictures and steps, alone and while the other one computes too (both share the
cores of this machine). The simulation gets the medians of those times and the same chats. `--report` only prints the table of a file of results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import which
from statistics import mean, median
from typing import Any

import httpx

from bench import servers
from bench.fleet import ROUTINGS, routers
from bench.fleet_chats import Chat, Traffic
from bench.fleet_replica import PrefixCache, Replica, Times
from bench.fleet_simulation import Fleet, Result
from bench.report import percentile
from bench.workloads import image_url, question
from models.shapes.checkpoint import FOLDER as DEMO

RESULTS = Path(__file__).with_name("fleet_trial.json")
PAGE = servers.ROOT / "docs" / "scaling.md"
SLOTS, QUEUE = 16, 32
OPENING_WORDS, QUESTION_WORDS, ANSWER_TOKENS = 400, 12, 12
TRAFFIC = Traffic(0.4, turns=4, pause_s=2.0, opening_tokens=0, question_tokens=0, answer_tokens=ANSWER_TOKENS)  # prompts are measured
PLAYED_S = 60.0
REPEATS = 20  # of each simulation, with other draws of the router
ROWS = (1, 2, 4, 8)
LINES = {"hash": "hash $glm_place consistent;", "random": "random;", "least connections": "least_conn;"}
AROUND = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{block}}}
"""


@dataclass
class Answer:
    turn: int
    first_s: float
    whole_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


@dataclass
class Measured:
    """The times of a replica in seconds, and the tokens of its prompts."""

    prompt: float
    token: float
    picture: float
    steps: list[tuple[int, float]]
    shared_speed: float  # of each of two that compute at once; 1: as quick as alone
    opening_tokens: int
    question_tokens: int
    unspelled_tokens: int  # at the end of an answer, which its next prompt spells in another way


class Talk:
    """A chat with a server, turn by turn."""

    def __init__(self, client: httpx.AsyncClient, key: str, seed: str, picture: bool = True, opening_words: int = OPENING_WORDS) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {key}"}
        self._rng = random.Random(seed)
        self._opening = question(self._rng, opening_words)
        self._picture = image_url(self._rng) if picture else None
        self._messages: list[dict[str, Any]] = []

    async def ask(self, url: str, session: str = "", answer_tokens: int = ANSWER_TOKENS, exact: bool = False) -> Answer:
        """`exact`: the answer has all of its tokens. Raises httpx.HTTPError for a failure, ValueError for a stream without an end."""
        text = question(self._rng, QUESTION_WORDS)
        content: list[dict[str, Any]] = [{"type": "text", "text": text if self._messages else self._opening + text}]
        if not self._messages and self._picture:
            content.insert(0, {"type": "image_url", "image_url": {"url": self._picture}})
        self._messages.append({"role": "user", "content": content})
        body = {
            "messages": self._messages, "max_tokens": answer_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": exact,
        }  # fmt: skip
        headers = {**self._headers, "x-session-id": session} if session else self._headers
        begun, first_s, words, usage = time.perf_counter(), 0.0, "", None
        async with self._client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                for choice in event.get("choices") or ():
                    if text := choice["delta"].get("content"):
                        first_s = first_s or time.perf_counter() - begun
                        words += text
                usage = event.get("usage") or usage
        if usage is None:
            raise ValueError("the stream ended without its usage")
        self._messages.append({"role": "assistant", "content": words})
        turn = len(self._messages) // 2
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        whole_s = time.perf_counter() - begun
        return Answer(turn, first_s or whole_s, whole_s, usage["prompt_tokens"], cached, usage["completion_tokens"])


async def measure(urls: list[str], key: str, seed: str) -> Measured:
    """The first replica's times while the other is idle, and how much slower both are together."""
    async with httpx.AsyncClient(timeout=300) as client:
        url = urls[0]

        async def first_of(count: int, **kind: Any) -> list[Answer]:
            return [await Talk(client, key, f"{seed} {kind} {number}", **kind).ask(url) for number in range(count)]

        short = await first_of(7, picture=False, opening_words=40)
        long = await first_of(7, picture=False)
        pictures = await first_of(7)
        talk = Talk(client, key, f"{seed} tokens")
        one, two = await talk.ask(url), await talk.ask(url)
        steps = [(rows, await step_s(client, key, [url], f"{seed} alone", rows)) for rows in ROWS]
        together = [await step_s(client, key, urls, f"{seed} {number}", 4) for number in range(2)]
        alone = [await step_s(client, key, [url], f"{seed} again {number}", 4) for number in range(2)]

    def first_s(answers: list[Answer]) -> float:
        return median(answer.first_s for answer in answers)

    token = (first_s(long) - first_s(short)) / (long[0].prompt_tokens - short[0].prompt_tokens)
    prompt = first_s(short) - token * short[0].prompt_tokens
    picture = first_s(pictures) - token * pictures[0].prompt_tokens - prompt
    question_tokens = two.prompt_tokens - one.prompt_tokens - one.answer_tokens
    return Measured(
        prompt, token, picture, steps, min(1.0, mean(alone) / mean(together)), one.prompt_tokens - question_tokens, question_tokens,
        one.prompt_tokens + one.answer_tokens - 1 - two.cached_tokens,
    )  # fmt: skip


async def step_s(client: httpx.AsyncClient, key: str, urls: list[str], seed: str, rows: int) -> float:
    """Seconds between two tokens of `rows` answers at a time of each server."""
    tokens = 40
    talks = [(url, Talk(client, key, f"{seed} {url} {rows} {row}", False, 20)) for url in urls for row in range(rows)]
    answers = await asyncio.gather(*(talk.ask(url, answer_tokens=tokens, exact=True) for url, talk in talks))
    return median((answer.whole_s - answer.first_s) / max(answer.answer_tokens - 1, 1) for answer in answers)


async def play(url: str, key: str, chats: list[Chat], seed: str) -> list[Answer]:
    answers: list[Answer] = []
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        talks = [Talk(client, key, f"{seed} {chat.name}") for chat in chats]  # drawn before the clock starts
        begun = time.perf_counter()

        async def one(chat: Chat, talk: Talk) -> None:
            await asyncio.sleep(max(0.0, begun + chat.begins_s - time.perf_counter()))
            for turn in chat.turns:
                await asyncio.sleep(turn.pause_s)
                answers.append(await talk.ask(url, chat.name, turn.answer_tokens))

        await asyncio.gather(*(one(chat, talk) for chat, talk in zip(chats, talks, strict=True)))
    return answers


@contextmanager
def nginx(routing: str, port: int, replicas: list[int]) -> Iterator[str]:
    """The block of docs/scaling.md with another line for the routing. Yields its URL."""
    block = PAGE.read_text(encoding="utf-8").split("```nginx\n")[1].split("```")[0].replace(LINES["hash"], LINES[routing])
    for printed, real in ((8080, replicas[0]), (8090, replicas[1]), (8000, port)):
        block = block.replace(f"127.0.0.1:{printed}", f"127.0.0.1:{real}")
    with tempfile.TemporaryDirectory(prefix="glm-fleet-") as folder:
        Path(folder).chmod(0o711)  # for workers of another user, who keep large bodies there
        conf = Path(folder) / "nginx.conf"
        conf.write_text(AROUND.format(folder=folder, block=block), encoding="utf-8")
        process = subprocess.Popen([which("nginx") or "/usr/sbin/nginx", "-c", str(conf), "-p", folder])
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(100):
                try:
                    httpx.get(f"{url}/livez", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def simulated(measured: list[Measured], chats: list[Chat], routing: str, ports: list[int], seed: int) -> Result:
    """With the medians of what was measured: on a busy machine single times are off by a factor."""

    def middle(name: str) -> float:
        return median(getattr(each, name) for each in measured)

    steps = tuple((rows, median(dict(each.steps)[rows] for each in measured)) for rows in ROWS)
    times = Times(middle("prompt"), middle("token"), middle("picture"), steps)
    unspelled = round(middle("unspelled_tokens"))
    replicas = [Replica(times, SLOTS, QUEUE, PrefixCache(None, unspelled)) for _ in ports]
    router = routers([f"127.0.0.1:{port}" for port in ports], seed)[routing]()
    shared = middle("shared_speed")
    return Fleet(replicas, router, shared_speed=lambda busy: shared if busy > 1 else 1.0).run(chats)


def chats_of(measured: Measured, number: int) -> list[Chat]:
    """The chats of one round, with the tokens that their prompts have."""
    tokens = {"opening_tokens": measured.opening_tokens, "question_tokens": measured.question_tokens}
    return list(replace(TRAFFIC, **tokens).chats(f"trial {number}", PLAYED_S))


def trial(rounds: int, port: int, results: Path) -> None:
    front, ports = _ports(port)
    key = f"sk-{secrets.token_hex(16)}"
    settings = {"GLM_SLOTS": str(SLOTS), "GLM_QUEUE_SIZE": str(QUEUE), "OMP_NUM_THREADS": "1", "GLM_API_KEYS": f"trial:{key}"}
    found: dict[str, Any] = {"ports": ports, "measured": [], "plays": []}
    with (
        servers.this(DEMO, "float32", "cpu", port=ports[0], **settings) as one,
        servers.this(DEMO, "float32", "cpu", port=ports[1], **settings) as other,
    ):
        urls = [one.address.url, other.address.url]
        for play_number in range(3 * rounds + 1):
            found["measured"].append(asdict(asyncio.run(measure(urls, key, f"measure {play_number}"))))
            results.write_text(json.dumps(found) + "\n", encoding="utf-8")
            if play_number == 3 * rounds:
                break
            number, routing = play_number // 3, ROUTINGS[(play_number + play_number // 3) % 3]  # each round begins with another one
            chats = chats_of(Measured(**found["measured"][-1]), number)
            with nginx(routing, front, ports) as url:
                answers = asyncio.run(play(url, key, chats, f"{number} {routing}"))
            found["plays"].append({"round": number, "routing": routing, "answers": [_rounded(answer) for answer in answers]})
            print(f"round {number + 1} of {rounds}, {routing}: {len(answers)} answers", flush=True)


def _rounded(answer: Answer) -> list[float]:
    return [round(value, 4) for value in vars(answer).values()]


def report(results: Path) -> str:
    """The measured and the simulated figures side by side."""
    found = json.loads(results.read_text(encoding="utf-8"))
    measured = [Measured(**each) for each in found["measured"]]
    lines = ["| routing | | prompt tokens cached | later turns that find their picture | first token p50 / p95 | whole answer p95 |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for routing in ROUTINGS:
        real, model = Result(), Result()
        for each in found["plays"]:
            if each["routing"] == routing:
                _add_real(real, [Answer(*values) for values in each["answers"]], measured[0].opening_tokens)
                for repeat in range(REPEATS):
                    seed = REPEATS * each["round"] + repeat
                    _add(model, simulated(measured, chats_of(measured[0], each["round"]), routing, found["ports"], seed))
        lines += [_row(routing, "measured", real), _row("", "simulated", model), _difference(real, model)]
    return "\n".join(lines)


def times(results: Path) -> str:
    """What was measured of a replica: the medians, and the least and the most."""
    measured = [Measured(**each) for each in json.loads(results.read_text(encoding="utf-8"))["measured"]]

    def spread(values: list[float], unit_s: float, digits: int) -> str:
        low, middle, high = (f"{value / unit_s:.{digits}f}" for value in (min(values), median(values), max(values)))
        return f"{middle} ({low} to {high})"

    rows = [
        ("a prompt, ms", spread([each.prompt for each in measured], 1e-3, 0)),
        ("a token of it that is not cached, ms", spread([each.token for each in measured], 1e-3, 2)),
        ("a picture, ms", spread([each.picture for each in measured], 1e-3, 0)),
        *((f"a step of {rows} rows, ms", spread([dict(each.steps)[rows] for each in measured], 1e-3, 1)) for rows in ROWS),
        ("speed of each while both compute, alone = 1", spread([each.shared_speed for each in measured], 1.0, 2)),
    ]
    return "\n".join([f"| median of {len(measured)} (least to most) | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


def _add(total: Result, part: Result) -> None:
    total.firsts.extend(part.firsts)
    total.wholes.extend(part.wholes)
    total.later_firsts.extend(part.later_firsts)
    for name in ("prompt_tokens", "cached_tokens", "later", "found"):
        setattr(total, name, getattr(total, name) + getattr(part, name))


def _add_real(total: Result, answers: list[Answer], opening_tokens: int) -> None:
    later = [answer for answer in answers if answer.turn > 1]
    total.firsts.extend(answer.first_s for answer in answers)
    total.wholes.extend(answer.whole_s for answer in answers)
    total.prompt_tokens += sum(answer.prompt_tokens for answer in answers)
    total.cached_tokens += sum(answer.cached_tokens for answer in answers)
    total.later += len(later)
    total.found += sum(answer.cached_tokens >= opening_tokens for answer in later)


def _ports(port: int) -> tuple[int, list[int]]:
    """nginx's, and those of the replicas: the ring depends on them."""
    return port, [port + 1, port + 2]


def _row(routing: str, kind: str, result: Result) -> str:
    first = " / ".join(f"{(percentile(result.firsts, share) or 0) * 1e3:.0f}" for share in (0.5, 0.95))
    return f"| {routing} | {kind} | {result.token_hits:.1%} | {result.turn_hits:.1%} | {first} ms | {result.whole_s(0.95) * 1e3:.0f} ms |"


def _difference(real: Result, model: Result) -> str:
    """Simulated less measured: points of a hundred for rates, parts of the measured for times."""
    p50, p95, whole = (
        f"{simulated_s / measured_s - 1:+.0%}"
        for simulated_s, measured_s in (
            (model.first_s(0.5), real.first_s(0.5)), (model.first_s(0.95), real.first_s(0.95)), (model.whole_s(0.95), real.whole_s(0.95)),
        )
    )  # fmt: skip
    tokens, turns = ((model.token_hits - real.token_hits) * 100, (model.turn_hits - real.turn_hits) * 100)
    return f"| | difference | {tokens:+.1f} points | {turns:+.1f} points | {p50} / {p95} | {whole} |"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet_trial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--port", type=int, default=8960, help="nginx listens here, the replicas on the next two (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args(words)
    if not options.report:
        trial(options.rounds, options.port, options.results)
    print(f"{times(options.results)}\n\n{report(options.results)}")


if __name__ == "__main__":
    main()
