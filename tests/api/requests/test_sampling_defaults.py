"""The longest answer of a request that sets none, and the room that a thought leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_model import fake_model

from api.engine.loaded_model import AnswerLimits, Model
from api.protocol.schemas import ChatRequest
from api.requests.sampling_params import ROOM_AFTER_THOUGHT, sampling_params
from settings import Settings


@pytest.fixture(scope="module")
def model() -> Model:
    return replace(fake_model(lambda p, i: "x"), context_tokens=32_768, answer=AnswerLimits(2048, 8192))


def _sampling(model: Model, settings: Settings | None = None, prompt: int = 100, **fields: object):
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], **fields})
    return sampling_params(chat, model, prompt, settings or Settings(), 0, None)


def test_a_thought_ends_before_the_longest_answer(model: Model) -> None:
    sampling = _sampling(model)
    assert (sampling.max_tokens, sampling.thinking_tokens) == (8192, 8192 - ROOM_AFTER_THOUGHT)
    plain = _sampling(model, chat_template_kwargs={"enable_thinking": False})
    assert (plain.max_tokens, plain.thinking_tokens) == (2048, None)


def test_little_room_is_shared(model: Model) -> None:
    sampling = _sampling(model, prompt=32_768 - 400)
    assert (sampling.max_tokens, sampling.thinking_tokens) == (400, 300)


def test_limits_of_the_request_and_the_operator_come_first(model: Model) -> None:
    asked = _sampling(model, max_tokens=600)
    assert (asked.max_tokens, asked.thinking_tokens) == (600, None)
    assert _sampling(model, Settings(default_max_tokens=3000)).max_tokens == 3000
    assert _sampling(model, Settings(default_max_tokens=3000)).thinking_tokens == 3000 - 750
