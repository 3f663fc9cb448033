"""Asks the API and the page over HTTP and says what came back. Every probe ends at its deadline, whatever happens.

A socket's own time limit starts again with every byte, so a server that trickles could hold a probe for ever:
each probe runs in a thread that is left behind when its time is up. Judges nothing; monitor/verdict.py does.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import requests

from monitor import question

CONNECT_LIMIT_S = 1.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """One HTTP exchange. `outcome`: answered, refused (nothing listens), silent (no answer in time), failed."""

    outcome: str
    seconds: float
    status: int = 0
    body: dict | None = None
    detail: str = ""


@dataclass(frozen=True)
class Answer:
    """The real question. `outcome`: right, wrong, rejected (an HTTP error), silent, refused, failed, skipped."""

    outcome: str
    seconds: float = 0.0
    status: int = 0
    expected: str = ""
    text: str = ""
    detail: str = ""


class Deadline(Generic[Result]):
    """Runs a function in a thread of its own; `result` waits for it, but not beyond the limit."""

    def __init__(self, function: Callable[[], Result], limit_s: float, late: Result) -> None:
        self._result = late
        self._error: Exception | None = None
        self._ends_at = time.monotonic() + limit_s
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._done = threading.Event()
        self._thread.start()

    def _run(self, function: Callable[[], Result]) -> None:
        try:
            result = function()
            if not self._done.is_set():
                self._result = result
        except Exception as error:  # handed to whoever asks for the result
            self._error = error
        self._done.set()

    def result(self) -> Result:
        self._done.wait(max(0.0, self._ends_at - time.monotonic()))
        self._done.set()
        if self._error is not None:
            raise self._error
        return self._result


def get(url: str, limit_s: float, method: str = "GET", body: dict | None = None, key: str = "") -> Reply:
    """One exchange, over within `limit_s` even if the server sends a byte now and then."""
    late = Reply("silent", limit_s, detail=f"no answer within {limit_s:.1f} s")
    return Deadline(lambda: _exchange(method, url, limit_s, body, key), limit_s, late).result()


def ask_surely(base_url: str, key: str, limit_s: float, rng: random.Random) -> Answer:
    """Ask; after a wrong answer ask about two more pictures, and both must be right.

    No model is right every time, and one slip a hundred would be an alarm twice a day; one that no longer
    sees is right once in seven by luck, and seldom twice in a row.
    """
    ends_at = time.monotonic() + limit_s
    first = ask(base_url, key, limit_s, rng)
    if first.outcome != "wrong":
        return first
    told = [first]
    for _ in range(2):
        left_s = ends_at - time.monotonic()
        if left_s <= 0.1:
            return first
        told.append(ask(base_url, key, left_s, rng))
        if told[-1].outcome != "right":
            break
    else:
        return told[-1]
    wrong = [answer for answer in told if answer.outcome == "wrong"]
    expected, text = (" / ".join(getattr(answer, name) for answer in wrong) for name in ("expected", "text"))
    return Answer("wrong", round(sum(answer.seconds for answer in told), 3), first.status, expected, text)


def ask(base_url: str, key: str, limit_s: float, rng: random.Random) -> Answer:
    """Draw a picture, ask about it, read the answer."""
    asked = question.draw(rng)
    expected = f"{asked.color} {asked.shape}"
    reply = get(f"{base_url}/v1/chat/completions", limit_s, "POST", asked.body, key)
    if reply.outcome != "answered":
        return Answer(reply.outcome, reply.seconds, expected=expected, detail=reply.detail)
    if reply.status != 200:
        return Answer("rejected", reply.seconds, reply.status, expected, detail=_error_message(reply))
    try:
        text = (reply.body or {})["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        return Answer("failed", reply.seconds, reply.status, expected, detail="the reply holds no answer")
    outcome = "right" if question.is_right(asked, text) else "wrong"
    return Answer(outcome, reply.seconds, reply.status, expected, text[:200])


def _exchange(method: str, url: str, limit_s: float, body: dict | None, key: str) -> Reply:
    started = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers["User-Agent"] = "health_check"
    with requests.Session() as session:
        session.trust_env = False  # no proxy and no .netrc between the checker and this machine
        try:
            limits = (min(CONNECT_LIMIT_S, limit_s), limit_s)
            reply = session.request(method, url, json=body, headers=headers, timeout=limits)
        except requests.Timeout:
            return Reply("silent", _since(started), detail=f"no answer within {limit_s:.1f} s")
        except requests.ConnectionError as error:
            if "refused" in str(error).lower():
                return Reply("refused", _since(started), detail="nothing listens there")
            return Reply("failed", _since(started), detail=_brief(error))
        except requests.RequestException as error:
            return Reply("failed", _since(started), detail=_brief(error))
        try:
            parsed = reply.json()
        except ValueError:
            parsed = None
        return Reply("answered", _since(started), reply.status_code, parsed if isinstance(parsed, dict) else None)


def _error_message(reply: Reply) -> str:
    error = (reply.body or {}).get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or f"HTTP {reply.status}")[:300]


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
