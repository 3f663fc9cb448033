"""Tokens that a grammar leaves no choice about are computed in one chunk, and the answer still fits the grammar."""

from __future__ import annotations

import json
import queue
import time
from pathlib import Path

import pytest
from driving import WAIT_S, read
from prompts import ask, request_for

from api.engine.config import EngineConfig
from api.engine.engine import Engine
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.request import Done, Event
from api.engine.text.grammar import GrammarCompiler
from api.engine.text.grammar_text import AnswerForm

SCHEMA = {
    "type": "object",
    "properties": {"what is it": {"enum": ["circle", "square"]}, "colour": {"enum": ["red", "blue"]}},
    "required": ["what is it", "colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    config = EngineConfig(model=str(tiny_checkpoint), threads=1, device="cpu", slots=3, encoder_cache_bytes=2**20)
    return load(config, lambda fraction: None)


def answer(model: Model, count: int = 3, **sampling) -> tuple[list[str], list[Done], int]:
    """Texts and ends of several answers at once, and the steps that they took."""
    compiler = GrammarCompiler(model.vocabulary, model.end_ids)
    engine = Engine(lambda progress: model, 9)
    engine.start()
    try:
        deadline = time.monotonic() + WAIT_S
        while engine.stats().state == "loading":
            assert time.monotonic() < deadline and not engine.stats().reason
            time.sleep(0.01)
        inboxes = []
        for number in range(count):
            grammar = compiler.compile(AnswerForm(schema=SCHEMA, may_think=False))
            events: queue.Queue[Event] = queue.Queue()
            request = request_for(model, [ask("What is it? " * (number + 1))], [], name=f"{number}", max_tokens=200, grammar=grammar, temperature=1.0, seed=number, **sampling)
            engine.submit(request, events.put)
            inboxes.append(events)
        pairs = [read(events) for events in inboxes]
        engine._scheduler.check()
        return [text for text, _ in pairs], [end for _, end in pairs], engine.steps
    finally:
        engine.stop(WAIT_S)


def test_forced_tokens_take_no_steps(model: Model) -> None:
    texts, ends, steps = answer(model)

    for text, end in zip(texts, ends, strict=True):
        found = json.loads(text)
        assert found["what is it"] in ("circle", "square") and found["colour"] in ("red", "blue")
        assert isinstance(end, Done) and end.reason == "stop"
    assert steps < max(end.completion_tokens for end in ends) - 10


def test_with_log_probabilities_each_token_has_its_own_step(model: Model) -> None:
    texts, ends, steps = answer(model, logprobs=1)

    assert all(json.loads(text)["colour"] in ("red", "blue") for text in texts)
    assert steps >= max(end.completion_tokens for end in ends)
