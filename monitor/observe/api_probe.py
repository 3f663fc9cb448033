"""Probes the API with real questions, each with a deadline.

At most one question is in flight, in the slot that the server reserves for health probes.
"""

from __future__ import annotations

import json
import random
import time
from http.client import HTTPResponse
from typing import Any

from sseclient import SSEClient

from monitor.judge.evidence import Answer
from monitor.observe import question
from monitor.observe.http_exchange import (
    ConnectionHandle,
    Deadline,
    failed_reply,
    open_exchange,
    seconds_since,
)

PROBE_HEADER = "X-GLM-Probe"


class Prober:
    """Asks the questions of one run. `model` is sent only to external engines, which require it."""

    def __init__(self, base_url: str, key: str, token: str, rng: random.Random, model: str = "") -> None:
        self._url = f"{base_url}/v1/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        if token:
            self._headers[PROBE_HEADER] = token
        self._rng = rng
        self._model = model

    def ask_text(self, limit_s: float) -> Answer:
        return self._ask(question.text_question(self._rng), limit_s)

    def ask_image(self, limit_s: float) -> Answer:
        """After a wrong answer, asks about two more images; both answers must be right.

        No model is always right: an error rate of 1 % would raise two alarms a day. A blind model guesses right about once
        in seven times, and rarely twice in a row.
        """
        ends_at = time.monotonic() + limit_s
        first = self._ask(question.image_question(self._rng), limit_s)
        if first.outcome != "wrong":
            return first
        answers = [first]
        for _ in range(2):
            left_s = ends_at - time.monotonic()
            if left_s <= 0.1:
                return first
            answers.append(self._ask(question.image_question(self._rng), left_s))
            if answers[-1].outcome != "right":
                break
        else:
            return answers[-1]
        wrong = [answer for answer in answers if answer.outcome == "wrong"]
        expected, text = (" / ".join(getattr(answer, name) for answer in wrong) for name in ("expected", "text"))
        seconds = round(sum(answer.seconds for answer in answers), 3)
        return Answer("picture", "wrong", seconds, first.status, expected, text)

    def _ask(self, asked: question.Question, limit_s: float) -> Answer:
        handle = ConnectionHandle()
        body = json.dumps({"model": self._model, **asked.body} if self._model else asked.body).encode()
        timeout = Answer(asked.kind, "silent", limit_s, expected=asked.expected, detail=f"no answer within {limit_s:.1f} s")

        def send() -> Answer:
            started = time.monotonic()
            try:
                with open_exchange(handle, self._url, limit_s, "POST", body, self._headers) as response:
                    return _read_answer(asked, response, started)
            except Exception as error:
                failed = failed_reply(error, started, limit_s)
                return Answer(asked.kind, failed.outcome, failed.seconds, expected=asked.expected, detail=failed.detail)

        # Closing the socket at the deadline also makes the server cancel the request.
        return Deadline(send, limit_s, timeout, handle.close).result()


def _read_answer(asked: question.Question, response: HTTPResponse, started: float) -> Answer:
    kind, expected = asked.kind, asked.expected
    if response.status != 200:
        message = _error_message(response.read(65536), response.status)
        return Answer(kind, "rejected", seconds_since(started), response.status, expected, detail=message)
    text, first_s, gap_s, last = "", None, 0.0, started
    for event in SSEClient(response).events():
        if event.data == "[DONE]":
            outcome = "right" if asked.is_right(text) else "wrong"
            return Answer(kind, outcome, seconds_since(started), 200, expected, text[:200], "", first_s, round(gap_s, 3))
        chunk = _parsed(event.data)
        if "error" in chunk:
            message = _message_of(chunk) or "an error event"
            return Answer(kind, "failed", seconds_since(started), 200, expected, text[:200], message, first_s)
        piece = _delta(chunk, kind)
        if piece:
            now = time.monotonic()
            first_s = seconds_since(started) if first_s is None else first_s
            gap_s, last = max(gap_s, now - last if text else 0.0), now
            text += piece
    detail = "the stream ended without its end marker"
    return Answer(kind, "cut", seconds_since(started), 200, expected, text[:200], detail, first_s, round(gap_s, 3))


def _parsed(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        return {"error": {"message": f"an event that is not JSON: {data[:80]!r}"}}
    return chunk if isinstance(chunk, dict) else {}


def _delta(chunk: dict[str, Any], kind: str) -> str:
    """The new text. Reasoning counts for text questions only: an image must be described in the content."""
    try:
        delta = chunk["choices"][0]["delta"]
    except (KeyError, IndexError, TypeError):
        return ""
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") if kind == "text" else None
    return str(delta.get("content") or reasoning or "")


def _error_message(body: bytes, status: int) -> str:
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    return _message_of(parsed if isinstance(parsed, dict) else {}) or f"HTTP {status}"


def _message_of(body: dict[str, Any]) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "")[:300]
