"""The engine's thread with a fake model, without torch: order, ends, aborts, drains, deaths."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from driving import WAIT_S, Driver, read
from fake_model import fake_model

from api.engine.engine import NotAccepting
from api.engine.loaded_model import LoadError, Model
from api.engine.request import Done, Failed, Failure, FinishReason
from api.engine.scheduler import QueueFull


def test_a_request_streams_token_by_token_and_ends_once(drive) -> None:
    driver = drive(answer=lambda prompt, images: "héllo")

    events = driver.ask("q")
    text, end = read(events)

    assert text == "héllo"
    assert isinstance(end, Done) and end.reason is FinishReason.STOP
    assert end.completion_tokens == 7 and end.prompt_tokens == 1  # six bytes and the end token
    driver.until(lambda: driver.engine.stats().state == "idle")
    assert events.empty()


def test_max_tokens_ends_with_length(drive) -> None:
    text, end = read(drive(answer=lambda p, i: "abcdef").ask("q", max_tokens=3))

    assert (text, end.reason) == ("abc", FinishReason.LENGTH)


def test_the_context_ends_with_length(drive) -> None:
    text, end = read(drive(answer=lambda p, i: "x" * 50, context_tokens=12).ask("12345678"))

    assert (text, end.reason) == ("xxxx", FinishReason.LENGTH)


def test_a_stop_string_ends_the_answer_before_it(drive) -> None:
    text, end = read(drive(answer=lambda p, i: "one. two. three").ask("q", stop=("two",)))

    assert (text, end.reason) == ("one. ", FinishReason.STOP)
    assert end.completion_tokens == len("one. two")  # nothing is computed after the stop string


def test_requests_run_one_after_another_in_order_of_arrival(drive) -> None:
    driver = drive(answer=lambda p, i: "abc")
    streams = [driver.ask("q", name) for name in "123"]

    assert [read(stream)[0] for stream in streams] == ["abc"] * 3
    order = driver.runner.decoded
    assert order == sorted(order)


def test_a_full_queue_refuses_and_delivers_nothing(drive) -> None:
    driver = drive(queue_size=1)
    driver.ask("HANG", "a")
    driver.runner.hanging.wait(WAIT_S)
    driver.ask("q", "b")

    with pytest.raises(QueueFull):
        driver.ask("q", "c")


def test_abort_while_queued_takes_effect_at_the_next_step(drive) -> None:
    driver = drive(queue_size=1)
    driver.ask("HANG", "a")
    driver.runner.hanging.wait(WAIT_S)
    waiting = driver.ask("q", "b")

    driver.engine.abort("b")
    driver.runner.release.set()

    assert read(waiting)[1].kind is Failure.ABORTED
    assert "b" not in driver.runner.decoded


def test_abort_while_running_stops_before_the_next_token(drive) -> None:
    driver = drive(answer=lambda p, i: "x" * 1000, token_s=0.005)
    events = driver.ask("q")
    events.get(timeout=WAIT_S)

    driver.engine.abort("r")
    end = read(events)[1]

    assert isinstance(end, Failed) and end.kind is Failure.ABORTED
    assert len(driver.runner.decoded) < 900
    driver.until(lambda: driver.engine.stats().state == "idle")


def test_abort_of_an_unknown_or_finished_request_is_ignored(drive) -> None:
    driver = drive()
    read(driver.ask("q"))

    driver.engine.abort("r")
    driver.engine.abort("unknown")

    assert isinstance(read(driver.ask("again"))[1], Done)


def test_one_failing_request_does_not_end_the_next(drive) -> None:
    driver = drive()

    failed = read(driver.ask("FAIL", "a"))[1]
    fine = read(driver.ask("q", "b"))[1]

    assert failed.kind is Failure.ENGINE and "told to fail" not in failed.message
    assert isinstance(fine, Done)


def test_a_lost_device_fails_every_request_and_shows_as_dead(drive) -> None:
    driver = drive()
    blocker = driver.ask("HANG", "0")
    driver.runner.hanging.wait(WAIT_S)
    lost, waiting = driver.ask("CRASH", "a"), driver.ask("q", "b")
    driver.runner.release.set()

    assert isinstance(read(blocker)[1], Done)
    assert [read(stream)[1].kind for stream in (lost, waiting)] == [Failure.DEAD] * 2
    stats = driver.engine.stats()
    assert stats.state == "dead" and "told to lose the device" in (stats.reason or "")
    with pytest.raises(NotAccepting):
        driver.ask("q")


def test_a_model_that_cannot_be_loaded_shows_as_dead_with_the_reason() -> None:
    def load(progress: object) -> Model:
        raise LoadError("models/none: there is nothing here.")

    driver = Driver(load=load).ready()

    assert driver.engine.stats().state == "dead"
    assert driver.engine.stats().reason == "models/none: there is nothing here."
    driver.engine.stop(WAIT_S)


def test_the_reason_of_a_death_is_logged(drive, caplog) -> None:
    read(drive().ask("CRASH"))

    assert 'event=engine_dead reason="DeviceLost: told to lose the device"' in caplog.text


def test_loading_reports_its_progress_and_accepts_no_requests() -> None:
    go = threading.Event()
    reported = threading.Event()

    def load(progress: Callable[[float], None]) -> Model:
        progress(0.4)
        progress(0.2)  # never goes back
        reported.set()
        go.wait(WAIT_S)
        return fake_model()

    driver = Driver(load=load)
    assert reported.wait(WAIT_S)
    stats = driver.engine.stats()

    assert (stats.state, stats.progress) == ("loading", 0.4)
    with pytest.raises(NotAccepting):
        driver.ask("q")
    go.set()
    driver.ready()
    assert driver.engine.stats().progress == 1.0
    driver.engine.stop(WAIT_S)


def test_counters_can_be_read_while_a_step_hangs(drive) -> None:
    driver = drive()
    driver.ask("HANG")
    driver.runner.hanging.wait(WAIT_S)

    stats = driver.engine.stats()

    assert (stats.state, stats.phase, stats.running, stats.waiting) == ("busy", "prefill", 1, 0)


def test_steps_are_counted_and_timed(drive) -> None:
    driver = drive(answer=lambda p, i: "abc")
    read(driver.ask("q"))
    driver.until(lambda: driver.engine.stats().steps == 4)  # one prefill, three more tokens

    stats = driver.engine.stats()
    assert stats.last_step_age_s is not None and stats.last_step_age_s >= 0
    assert stats.last_step_s is not None and stats.last_step_s >= 0


def test_drain_finishes_running_requests_and_accepts_no_more(drive) -> None:
    driver = drive(answer=lambda p, i: "x" * 30, token_s=0.01)
    events = driver.ask("q")
    events.get(timeout=WAIT_S)

    finished = driver.engine.drain(WAIT_S)

    assert finished and isinstance(read(events)[1], Done)
    assert driver.engine.stats().state == "draining"
    with pytest.raises(NotAccepting):
        driver.ask("q")


def test_drain_fails_requests_past_its_deadline(drive) -> None:
    driver = drive()
    hanging, waiting = driver.ask("HANG", "a"), driver.ask("q", "b")
    driver.runner.hanging.wait(WAIT_S)

    assert driver.engine.drain(0.05) is False
    assert [read(stream)[1].kind for stream in (hanging, waiting)] == [Failure.SHUTDOWN] * 2
    driver.runner.release.set()
    driver.engine.stop(WAIT_S)
    assert hanging.empty() and waiting.empty()  # one end each, though the hanging step came back


def test_a_step_that_fails_after_the_drain_delivers_nothing_more(drive) -> None:
    driver = drive()
    events = driver.ask("HANG and then FAIL")
    driver.runner.hanging.wait(WAIT_S)
    driver.engine.drain(0)
    driver.runner.release.set()
    driver.until(lambda: driver.engine.stats().steps == 1)

    assert read(events)[1].kind is Failure.SHUTDOWN
    assert events.empty()
