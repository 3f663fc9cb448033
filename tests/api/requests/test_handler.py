"""Events pass from the engine thread to the event loop of their request, all of a step at once."""

from __future__ import annotations

import asyncio
import threading

from api.engine.request import Delta, Done, FinishReason
from api.requests.handler import Inbox, Post


class Counted:
    """Notes what is measured, and in which thread."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, float | None, bool]]] = []
        self.threads: set[int] = set()

    def step(self, texts: list[tuple[int, float | None, bool]]) -> None:
        self.steps.append(texts)
        self.threads.add(threading.get_ident())


def test_events_of_another_thread_arrive_in_order_with_their_choice() -> None:
    async def read() -> list[tuple[int, str]]:
        post, inbox = Post(Counted()), Inbox()

        def deliver() -> None:
            for number, text in enumerate("abcdef"):
                post.put(inbox, number % 2, Delta(text, 1))
                if number % 3 == 2:
                    post.wake()

        threading.Thread(target=deliver).start()
        received: list[tuple[int, Delta]] = []
        while len(received) < 6:
            received += await inbox.next(10)
        return [(index, event.text) for index, event in received]

    assert asyncio.run(read()) == [(number % 2, text) for number, text in enumerate("abcdef")]


def test_a_step_wakes_a_loop_once() -> None:
    async def count() -> tuple[int, list[int]]:
        post, inboxes, loop = Post(Counted()), [Inbox() for _ in range(5)], asyncio.get_running_loop()
        calls, original = [], loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), original(*args))[1]  # type: ignore[method-assign]
        for inbox in inboxes:
            post.put(inbox, 0, Delta("a", 1))
            post.put(inbox, 0, Delta("b", 1))
        post.wake()
        post.wake()
        return len(calls), [len(await inbox.next(10)) for inbox in inboxes]

    assert asyncio.run(count()) == (1, [2] * 5)


def test_what_a_step_has_written_is_measured_in_the_event_loop() -> None:
    metrics = Counted()
    last = Done(FinishReason.STOP, 1, 2, 0.0, 0.0, 0.0)

    def work(post: Post, user: Inbox, probe: Inbox) -> None:
        for events in ([(user, 0), (user, 1)], [(user, 1), (probe, 0)]):
            for inbox, index in events:
                post.put(inbox, index, Delta("ab", 2))
            post.wake()
        post.put(user, 1, last)
        post.wake()

    async def run() -> None:
        post, user, probe = Post(metrics), Inbox(), Inbox(probe=True)
        await asyncio.to_thread(work, post, user, probe)
        assert len(await user.next()) == 4

    asyncio.run(run())

    first, second = metrics.steps
    assert first == [(2, None, False), (2, None, False)]
    assert second == [(2, second[0][1], False), (2, None, True)]
    assert second[0][1] is not None and 0 <= second[0][1] < 10
    assert metrics.threads == {threading.get_ident()}


def test_waiting_times_out_without_an_event() -> None:
    async def wait() -> object:
        return await Inbox().next(0.01)

    assert asyncio.run(wait()) == []


def test_an_event_for_a_closed_loop_is_dropped() -> None:
    async def leave() -> Inbox:
        return Inbox()

    post, inbox = Post(Counted()), asyncio.run(leave())

    post.put(inbox, 0, Delta("late", 1))
    post.wake()
