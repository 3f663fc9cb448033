"""A request on a kept connection waits for nobody's delayed acknowledgement."""

from __future__ import annotations

from kept_connection import has_no_delay, slowdown_of_kept


def test_answers_are_sent_at_once(start) -> None:
    server = start()

    assert has_no_delay(server.process.pid, server.port)


def test_a_kept_connection_is_no_slower_than_a_new_one(start) -> None:
    assert slowdown_of_kept(start().url + "/health") < 1.5
