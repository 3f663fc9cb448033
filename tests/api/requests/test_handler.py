"""The inbox of a request handler passes events from the engine thread to an event loop."""

from __future__ import annotations

import asyncio
import threading

from api.engine.request import Delta
from api.requests.handler import Inbox


def test_events_of_another_thread_arrive_in_order_with_their_choice() -> None:
    async def read() -> list[tuple[int, str]]:
        inbox = Inbox()
        events = [(0, Delta("a", 1)), (1, Delta("b", 1)), (0, Delta("c", 1))]
        threading.Thread(target=lambda: [inbox.deliver(*event) for event in events]).start()
        received = [await inbox.next(10) for _ in events]
        return [(index, event.text) for index, event in received]

    assert asyncio.run(read()) == [(0, "a"), (1, "b"), (0, "c")]


def test_waiting_times_out_without_an_event() -> None:
    async def wait() -> object:
        return await Inbox().next(0.01)

    assert asyncio.run(wait()) is None


def test_an_event_for_a_closed_loop_is_dropped() -> None:
    async def leave() -> Inbox:
        return Inbox()

    inbox = asyncio.run(leave())

    inbox.deliver(0, Delta("late", 1))
