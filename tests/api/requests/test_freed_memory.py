"""When the memory of large bodies is returned to the system."""

from __future__ import annotations

import asyncio

from api.requests import freed_memory
from api.requests.freed_memory import FreedMemory


def test_memory_is_returned_once_and_only_when_the_server_is_quiet(monkeypatch) -> None:
    monkeypatch.setattr(freed_memory, "QUIET_S", 0.02)
    busy, released = [True], []

    async def live() -> None:
        memory = FreedMemory(lambda: busy[0], lambda: released.append(1))
        for _ in range(20):
            memory.expect()
        await asyncio.sleep(0.1)
        assert not released, "while requests are worked on, the memory is needed again"
        busy[0] = False
        await asyncio.sleep(0.1)
        assert released == [1]

    asyncio.run(live())
