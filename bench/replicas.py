"""python -m bench.replicas: what chats find in the caches of several replicas behind nginx, with and without a session.

Each chat shows a picture of its own and goes on about it for some turns. One half names itself in `x-session-id`, the other half
does not, and both ask at the same time. A follow-up question that reaches a replica which has not seen its chat computes the
picture and all earlier turns again.
"""

from __future__ import annotations

import argparse
import base64
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from bench.project_copy import started_copy
from models.shapes.pictures import COLORS, draw_shapes

QUESTIONS = ("What is in the picture?", "What color is the shape?", "Where is it?", "Is there a circle?", "How many shapes are there?")
ANSWER_TOKENS = 12
LIMIT_S = 300.0
SETTINGS = {"GLM_DEVICE": "cpu", "GLM_SLOTS": "8"}


@dataclass
class FollowUps:
    """Of the questions after the first of each chat: tokens of their prompts, and those found in a cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    asked: int = 0
    full: int = 0  # questions that found most of their prompt, which the picture is most of

    @property
    def share(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)


def picture(number: int) -> str:
    """A data URL; no two numbers have the same picture."""
    buffer = io.BytesIO()
    draw_shapes([(sorted(COLORS)[number % len(COLORS)], "circle")], seed=number).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(url: str, key: str, number: int, session: str, turns: int, seen: FollowUps, lock: threading.Lock) -> None:
    """Asks one question after another. Raises httpx.HTTPError for one that is not answered."""
    headers = {"Authorization": f"Bearer {key}", **({"x-session-id": session} if session else {})}
    content: object = [{"type": "image_url", "image_url": {"url": picture(number)}}, {"type": "text", "text": QUESTIONS[0]}]
    messages: list[dict[str, object]] = [{"role": "user", "content": content}]
    # A connection for each question, as browsers and many programs have: with one kept open nginx would still choose anew.
    with httpx.Client(headers=headers, timeout=LIMIT_S, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        for turn in range(turns):
            body = {"messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
            reply = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
            usage = reply["usage"]
            if turn:
                with lock:
                    cached = usage["prompt_tokens_details"]["cached_tokens"]
                    seen.prompt_tokens += usage["prompt_tokens"]
                    seen.cached_tokens += cached
                    seen.full += cached >= usage["prompt_tokens"] / 2
                    seen.asked += 1
            answer = str(reply["choices"][0]["message"]["content"] or "-")
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": QUESTIONS[(turn + 1) % len(QUESTIONS)]}]


def measure(url: str, key: str, chats: int, turns: int, first: int = 0) -> dict[str, FollowUps]:
    """{"with": ..., "without": ...} a session. `chats`: of each, all at the same time; `first`: the number of the first picture."""
    found, lock = {"with": FollowUps(), "without": FollowUps()}, threading.Lock()
    problems: list[Exception] = []

    def one(number: int, kind: str) -> None:
        try:
            chat(url, key, number, f"chat-{number}" if kind == "with" else "", turns, found[kind], lock)
        except Exception as error:
            problems.append(error)

    threads = [
        threading.Thread(target=one, args=(first + 2 * number + place, kind)) for number in range(chats) for place, kind in enumerate(found)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return found


def table(replicas: int, found: dict[str, FollowUps]) -> list[str]:
    """Rows of Markdown."""
    rows = []
    for kind in ("with", "without"):
        seen = found[kind]
        rows.append(f"| {replicas} | {kind} | {100 * seen.share:.1f} % | {seen.full} of {seen.asked} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--chats", type=int, default=10, help="with a session, and as many without")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args(arguments)
    print("| replicas | session | tokens found in a cache | follow-up questions that found their picture |")
    print("| --- | --- | --- | --- |")
    for replicas in given.replicas:
        with started_copy(SETTINGS, "replicas", replicas) as copy:
            print("\n".join(table(replicas, measure(copy.url, copy.key, given.chats, given.turns))), flush=True)


if __name__ == "__main__":
    main()
