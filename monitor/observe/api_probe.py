"""Probes the API with GET /info and real questions, each with a deadline.

At most one question is in flight, in the slot that the server reserves for health probes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from http.client import HTTPResponse
from typing import Any

from sseclient import SSEClient

from monitor.judge.accuracy import CLEAR, Accuracy, after_answers
from monitor.judge.evidence import Answer
from monitor.observe import question
from monitor.observe.http_exchange import (
    ConnectionHandle,
    Deadline,
    bounded_lines,
    exchange,
    failed_reply,
    open_exchange,
    parse_json,
    seconds_since,
)

PROBE_HEADER = "X-GLM-Probe"
MORE_WITHIN_S = 0.5  # a second picture question is asked only where the first took no longer
EXTRA_S = 5.0  # of a run, for questions that a suspicion or a missing baseline adds
REFINE_S = 0.05  # of a run and family, for questions that make a baseline more exact
MOST_EXTRA = 12
LEAST_S = 0.1
ANSWER_LIMIT_BYTES = 2**20  # of a stream: the answer to a short question has some kilobytes
ONLY_THOUGHTS = "only thoughts and no answer"
# Not the kernels, which are still being compiled when the server begins to answer, and compute the same.
RECIPE = ("device", "dtype", "quantization")


class Prober:
    """Asks the questions of one run, of the kinds whose turn it is by `accuracy`. `model` is sent only to external engines,
    which require it. `idle`: nobody else is being answered, so that a baseline may be taken.
    """

    def __init__(
        self, base_url: str, key: str, token: str, rng: random.Random, model: str = "", accuracy: Accuracy | None = None, idle: bool = False
    ) -> None:  # fmt: skip
        self._url = f"{base_url}/v1/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        if token:
            self._headers[PROBE_HEADER] = token
        self._rng = rng
        self._model = model
        self._accuracy = accuracy or Accuracy()
        self._idle = idle
        self._plain = False  # set by a server that refuses schemas

    def ask_text(self, limit_s: float) -> Answer:
        return self._ask_kinds("text", question.TEXT_KINDS, 1, limit_s)

    def ask_image(self, limit_s: float) -> Answer:
        if question.CANNOT_DRAW:
            return Answer("picture", "skipped", detail=f"pictures cannot be drawn: {question.CANNOT_DRAW}")
        return self._ask_kinds("picture", question.PICTURE_KINDS, 2, limit_s)

    def _ask_kinds(self, family: str, kinds: tuple[str, ...], at_once: int, limit_s: float) -> Answer:
        """The questions of one family until `limit_s`: the regular ones, then what suspicion or a missing baseline adds."""
        started = time.monotonic()
        asked: list[Answer] = []
        known = self._accuracy

        def left_s() -> float:
            return started + limit_s - time.monotonic()

        for number in range(at_once):
            if number and time.monotonic() - started > MORE_WITHIN_S:
                break
            if number and not any(known.record(kind).sure for kind in kinds):
                break
            asked.append(self._ask(question.draw(regular_kind(known, family, kinds), self._rng), left_s()))
            known = after_answers(known, asked[-1:], 0.0)
            if not asked[-1].good or left_s() <= LEAST_S:
                return _joined(asked, self._accuracy)
        watched = watched_kind(known, family, kinds, {kind for answer in asked for kind, _ in answer.tries})
        if watched is not None and time.monotonic() - started < min(EXTRA_S, limit_s / 2):
            asked.append(self._ask(question.draw(watched, self._rng), left_s()))
            known = after_answers(known, asked[-1:], 0.0)
            if not asked[-1].good or left_s() <= LEAST_S:
                return _joined(asked, self._accuracy)
        more, regular_until = 0, time.monotonic()
        while left_s() > LEAST_S and time.monotonic() - started < min(EXTRA_S, limit_s / 2):
            kind = suspicious_kind(known, kinds) if more < MOST_EXTRA else None
            if kind is None and self._idle:
                refining = time.monotonic() - regular_until < REFINE_S
                kind = _untaken_kind(known, kinds) or (_vague_kind(known, kinds) if refining else None)
            if kind is None:
                break
            answer = self._ask(question.draw(kind, self._rng), left_s())
            if not answer.good and answer.outcome not in ("failed", "cut"):
                break  # the regular questions were answered, so this one says nothing more than that it is busy
            more += 1
            asked.append(answer)
            known = after_answers(known, [answer], 0.0)
            if not answer.good:
                break
        return _joined(asked, self._accuracy)

    def _ask(self, asked: question.Question, limit_s: float) -> Answer:
        started = time.monotonic()
        answer = self._send(asked, asked.plain if self._plain else asked.body, limit_s)
        left_s = limit_s - (time.monotonic() - started)
        if answer.outcome == "rejected" and answer.status in (400, 422) and not self._plain and left_s > LEAST_S:
            self._plain = True  # an engine without grammars
        elif answer.detail == ONLY_THOUGHTS and not self._plain and left_s > LEAST_S:
            self._plain = True  # an engine that cannot switch thinking off; the plain question leaves room for it
        else:
            return answer
        return self._send(asked, asked.plain, left_s)

    def _send(self, asked: question.Question, fields: Mapping[str, Any], limit_s: float) -> Answer:
        handle = ConnectionHandle()
        body = json.dumps({"model": self._model, **fields} if self._model else fields).encode()
        timeout = Answer(asked.family, "silent", limit_s, expected=asked.expected, detail=f"no answer within {limit_s:.1f} s")

        def send() -> Answer:
            started = time.monotonic()
            try:
                with open_exchange(handle, self._url, limit_s, "POST", body, self._headers) as response:
                    return _read_answer(asked, response, started)
            except Exception as error:
                failed = failed_reply(error, started, limit_s)
                return Answer(asked.family, failed.outcome, failed.seconds, expected=asked.expected, detail=failed.detail)

        # Closing the socket at the deadline also makes the server cancel the request.
        return Deadline(send, limit_s, timeout, handle.close).result()


def regular_kind(known: Accuracy, family: str, kinds: tuple[str, ...]) -> str:
    """The sure kinds in turn; without any, the first one that has no baseline yet. One question for what it tests together."""
    sure = {kind: None for kind in kinds if known.record(kind).sure}
    in_turn = [kind for kind in sure if question.SAME_QUESTION.get(kind) not in sure]
    if in_turn:
        return in_turn[known.turns.get(family, 0) % len(in_turn)]
    return _untaken_kind(known, kinds) or kinds[0]


def watched_kind(known: Accuracy, family: str, kinds: tuple[str, ...], tested: set[str]) -> str | None:
    """The one that was answered wrongly last, if that is not long ago and this run has not tested it."""
    return next((kind for kind in known.watched(family, kinds) if kind not in tested), None)


def _untaken_kind(known: Accuracy, kinds: tuple[str, ...]) -> str | None:
    return next((kind for kind in kinds if not known.record(kind).taken), None)


def _vague_kind(known: Accuracy, kinds: tuple[str, ...]) -> str | None:
    """The sure one with the fewest answers, if a fall from 97 % to 80 % could not be told from them."""
    vague = [kind for kind in kinds if known.record(kind).sure and known.record(kind).known < CLEAR]
    return min(vague, key=lambda kind: known.record(kind).known, default=None)


def suspicious_kind(known: Accuracy, kinds: tuple[str, ...]) -> str | None:
    """The one with the highest score."""
    scored = [kind for kind in kinds if known.record(kind).score > 0]
    return max(scored, key=lambda kind: known.record(kind).score, default=None)


def _joined(answers: list[Answer], known: Accuracy) -> Answer:
    """All answers of one family as one: what failed decides, then what was wrong. Without a sure kind nothing is judged."""
    tries = tuple(one for answer in answers for one in answer.tries)
    failed = next((answer for answer in answers if not answer.good), None)
    judged = [kind_right for kind_right in tries if known.record(kind_right[0]).sure]
    wrong = next((a for a in answers if any(known.record(kind).sure and not right for kind, right in a.tries)), None)
    shown = failed or wrong or answers[-1]
    outcome = failed.outcome if failed else "wrong" if wrong else "right" if judged else "unjudged"
    seconds = round(max(answer.seconds for answer in answers), 3)
    return replace(shown, outcome=outcome, seconds=seconds, tries=tries, questions=len(answers) - (failed is not None))


def _read_answer(asked: question.Question, response: HTTPResponse, started: float) -> Answer:
    family, expected = asked.family, asked.expected
    if response.status != 200:
        message = _error_message(response.read(65536), response.status)
        return Answer(family, "rejected", seconds_since(started), response.status, expected, detail=message)
    text, thoughts, first_s, gap_s, last = "", "", None, 0.0, started
    for event in SSEClient(bounded_lines(response, ANSWER_LIMIT_BYTES)).events():
        if event.data == "[DONE]":
            if not text.strip() and not thoughts:
                return Answer(family, "failed", seconds_since(started), 200, expected, detail="an empty answer")
            tries = tuple(asked.tries(text).items())
            outcome = "right" if all(right for _, right in tries) else "wrong"
            detail = "" if text.strip() else ONLY_THOUGHTS
            return Answer(
                family, outcome, seconds_since(started), 200, expected, text[:200], detail, first_s, round(gap_s, 3), tries, 1
            )
        chunk = _parsed(event.data)
        if "error" in chunk:
            message = _message_of(chunk) or "an error event"
            return Answer(family, "failed", seconds_since(started), 200, expected, text[:200], message, first_s)
        piece, thought = _delta(chunk, "content"), _delta(chunk, "reasoning_content") or _delta(chunk, "reasoning")
        thoughts = thoughts or thought
        if piece:
            now = time.monotonic()
            first_s = seconds_since(started) if first_s is None else first_s
            gap_s, last = max(gap_s, now - last if text else 0.0), now
            text += piece
    detail = "the stream ended without its end marker"
    return Answer(family, "cut", seconds_since(started), 200, expected, text[:200], detail, first_s, round(gap_s, 3))


def _parsed(data: str) -> dict[str, Any]:
    try:
        chunk = parse_json(data)
    except ValueError:
        return {"error": {"message": f"an event that is not JSON: {data[:80]!r}"}}
    return chunk if isinstance(chunk, dict) else {}


def _delta(chunk: dict[str, Any], field: str) -> str:
    try:
        return str(chunk["choices"][0]["delta"].get(field) or "")
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""


def _error_message(body: bytes, status: int) -> str:
    try:
        parsed = parse_json(body)
    except ValueError:
        parsed = None
    return _message_of(parsed if isinstance(parsed, dict) else {}) or f"HTTP {status}"


def _message_of(body: dict[str, Any]) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "")[:300]


def model_key(base_url: str, key: str, limit_s: float) -> dict[str, str] | None:
    """What a baseline belongs to, by GET /info: model, revision and recipe (what computes it). None if unknown."""
    reply = exchange(f"{base_url}/info", limit_s, headers={"Authorization": f"Bearer {key}"} if key else {})
    info = (reply.json() or {}) if reply.status == 200 else {}
    if not isinstance(info.get("model"), str):
        return None
    recipe = "/".join(str(info[name]) for name in RECIPE if info.get(name))
    return {"model": info["model"], "revision": str(info.get("revision") or ""), "recipe": str(info.get("recipe") or recipe)}
