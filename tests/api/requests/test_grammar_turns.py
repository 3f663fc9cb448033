"""Compiling grammars: the wide schemas of one key do not hold those of others, nor the checker's."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from fake_model import fake_model

from api.caller import Caller
from api.protocol.schemas import ChatRequest
from api.requests import sampling_params
from api.requests.sampling_params import Grammars

SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}, "additionalProperties": False}}}
CHAT = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], "response_format": SCHEMA})


def test_a_key_with_wide_schemas_waits_alone(monkeypatch) -> None:
    go, began = threading.Event(), []

    def compile_slowly(compiler: Any, form: Any, count: int) -> list[None]:
        name = threading.current_thread().name
        began.append(name)
        if len(began) == 1:
            go.wait(30)
        return [None] * count

    monkeypatch.setattr(sampling_params, "_compile_all", compile_slowly)
    ann, bob, probe = Caller("ann"), Caller("bob"), Caller("ann", probe=True)
    model, grammars = fake_model(), Grammars()

    async def ask() -> None:
        wide = [asyncio.create_task(grammars.compile(CHAT, False, model, ann)) for _ in range(5)]
        await asyncio.sleep(0.2)
        for caller in (bob, probe):
            assert await asyncio.wait_for(grammars.compile(CHAT, False, model, caller), 20) == [None]
        assert len(began) == 3, "the key's own requests wait for the first of them"
        go.set()
        await asyncio.gather(*wide)

    try:
        asyncio.run(ask())
    finally:
        go.set()
        grammars.close()
