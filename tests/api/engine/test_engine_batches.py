"""Many requests at once: shared steps, isolated failures, limits."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from driving import WAIT_S, Driver, read
from fake_model import FAIL_COLOUR, OutOfMemory
from PIL import Image

from api.engine.request import Delta, Done, Failed, Failure, FinishReason


def image(driver: Driver, colour: tuple[int, int, int]):
    return driver.model.image_processor.process(Image.new("RGB", (56, 56), colour))


def about(driver: Driver, colour: tuple[int, int, int], name: str, **fields):
    """Ask about an image of one colour; the fake encodes it to that colour."""
    one = image(driver, colour)
    return driver.ask("<|image|>" * one.tokens + f"what is this, {name}?", name, images=(one,), **fields)


def test_requests_share_steps(drive) -> None:
    driver = drive(slots=4, answer=lambda p, i: "x" * 50, queue_size=8)
    blocker = driver.ask("HANG", "0")
    driver.runner.hanging.wait(WAIT_S)
    streams = [driver.ask("q", str(number)) for number in range(1, 4)]
    driver.runner.release.set()

    assert [read(stream)[0] for stream in (blocker, *streams)] == ["x" * 50] * 4
    assert driver.engine.stats().steps < 60
    assert max(len(batch.sequences) for batch in driver.runner.batches) == 4


def test_one_failing_request_does_not_fail_the_others(drive) -> None:
    driver = drive(slots=4, answer=lambda p, i: "fine", queue_size=8)
    blocker = driver.ask("HANG", "0")
    driver.runner.hanging.wait(WAIT_S)
    streams = [driver.ask("FAIL" if number == 2 else "q", str(number)) for number in range(1, 4)]
    driver.runner.release.set()

    ends = [read(stream) for stream in (blocker, *streams)]

    assert [text for text, _ in ends] == ["fine", "fine", "", "fine"]
    assert isinstance(ends[2][1], Failed) and ends[2][1].kind is Failure.ENGINE


def test_a_request_that_ends_in_one_half_of_a_batch_is_not_computed_in_the_other(drive) -> None:
    driver = drive(slots=1, answer=lambda p, i: "fine").ready()
    parts = []

    def failing(batch):
        parts.append([(chunk.start, chunk.end) for chunk in batch.chunks])
        if batch.chunk_tokens > 32:
            raise OutOfMemory("too many tokens at once")
        raise ValueError("told to fail")

    driver.runner.compute = failing
    _, last = read(driver.ask("x" * 64))

    assert isinstance(last, Failed) and last.kind is Failure.ENGINE
    assert parts == [[(0, 64)], [(0, 32)]]


def test_an_image_that_cannot_be_encoded_fails_its_own_request(drive) -> None:
    driver = drive(slots=4, answer=lambda p, i: str(i[0]), queue_size=8)

    broken, fine = about(driver, FAIL_COLOUR, "a"), about(driver, (1, 2, 3), "b")

    assert read(broken)[1].kind is Failure.ENGINE
    assert read(fine)[0] == "(1, 2, 3)"


def test_images_and_prompts_alternate(drive, monkeypatch) -> None:
    driver = drive(slots=3, answer=lambda p, i: "fine", queue_size=8, chunk_tokens=64)
    blocker = driver.ask("HANG", "0")
    driver.runner.hanging.wait(WAIT_S)
    log: list[str] = []
    encode, compute = driver.runner.encode, driver.runner.compute
    monkeypatch.setattr(driver.runner, "encode", lambda task, limit_s: log.append("slice") or encode(task, limit_s))
    monkeypatch.setattr(driver.runner, "compute", lambda batch: log.extend("chunk" for _ in batch.chunks) or compute(batch))
    driver.runner.slices = 100
    streams = [about(driver, (1, 2, 3), "image"), driver.ask("q" * 640, "prompt")]
    driver.runner.release.set()

    assert [read(stream)[0] for stream in (blocker, *streams)] == ["fine"] * 3
    slices = [index for index, work in enumerate(log[:12]) if work == "slice"]  # the prompt has ten chunks
    assert len(slices) > 3  # the image is encoded meanwhile
    assert all(after - before > 2 for before, after in pairwise(slices)), log[:12]


def test_little_memory_makes_smaller_batches(drive) -> None:
    driver = drive(slots=6, answer=lambda p, i: "x" * 20, queue_size=8)
    driver.runner.most_rows = 2
    blocker = driver.ask("HANG", "0")
    driver.runner.hanging.wait(WAIT_S)
    streams = [driver.ask("q", str(number)) for number in range(1, 6)]
    driver.runner.release.set()

    assert [read(stream)[0] for stream in (blocker, *streams)] == ["x" * 20] * 6


def test_too_little_memory_for_one_request_fails_it(drive) -> None:
    driver = drive(slots=2)
    driver.runner.most_rows = 0

    assert read(driver.ask("q"))[1].kind is Failure.MEMORY


def test_a_deadline_ends_running_and_waiting_requests(drive) -> None:
    driver = drive(slots=1, answer=lambda p, i: "x" * 3000, token_s=0.005)
    running, waiting = driver.ask("q", "a", deadline_s=0.1), driver.ask("q", "b", deadline_s=0.05)

    ends = [read(stream)[1] for stream in (waiting, running)]

    assert [end.kind for end in ends] == [Failure.DEADLINE] * 2
    assert "0.1 s" in ends[1].message


def test_abort_frees_the_slot_before_the_next_step(drive) -> None:
    driver = drive(slots=1, answer=lambda p, i: "x" * 3000, token_s=0.005)
    first = driver.ask("q", "a")
    first.get(timeout=WAIT_S)
    second = driver.ask("q", "b", max_tokens=1)

    driver.engine.abort("a")

    assert isinstance(read(second)[1], Done)
    assert read(first)[1].kind is Failure.ABORTED


def test_a_probe_is_answered_while_everything_is_full(drive) -> None:
    driver = drive(slots=2, answer=lambda p, i: "x" * 3000, token_s=0.003, queue_size=2)
    for number in range(4):
        driver.ask("q", str(number))

    began = time.monotonic()
    text, end = read(driver.ask("q", "probe", probe=True, max_tokens=3))

    assert isinstance(end, Done) and text == "xxx"
    assert time.monotonic() - began < 2.0


def test_cached_tokens_and_hits_are_counted(drive) -> None:
    driver = drive(slots=2, answer=lambda p, i: "x")
    read(driver.ask("a long enough beginning, then this", "a"))

    end = read(driver.ask("a long enough beginning, then that", "b"))[1]

    assert isinstance(end, Done) and end.cached_tokens == len("a long enough beginning, then th")
    stats = driver.engine.stats()
    assert (stats.prefix_cache_hits, stats.prefix_cache_queries) == (end.cached_tokens, 2 * end.prompt_tokens)
    assert stats.kv_total_tokens > 0 and stats.slots == 2


def test_tenants_do_not_share_prefixes(drive) -> None:
    driver = drive(slots=2, answer=lambda p, i: "x")
    read(driver.ask("the same question of two people", "a", salt="a"))

    assert read(driver.ask("the same question of two people", "b", salt="b"))[1].cached_tokens == 0


def test_preemption_does_not_change_the_answers(drive) -> None:
    driver = drive(slots=4, answer=lambda p, i: p * 20, pages=12, page_tokens=8, context_tokens=90, queue_size=8)
    streams = [driver.ask(letter * 3, letter, max_tokens=60) for letter in "abcd"]

    assert [read(stream)[0] for stream in streams] == [letter * 60 for letter in "abcd"]
    assert driver.engine.stats().preemptions > 0
    driver.until(lambda: driver.engine.stats().kv_used_tokens == 0)


def test_a_phase_has_an_age_and_a_deadline(drive) -> None:
    driver = drive(slots=2)
    assert driver.engine.stats().phase_deadline_s is None  # idle has no limit
    driver.ask("HANG")
    driver.runner.hanging.wait(WAIT_S)
    time.sleep(0.02)

    stats = driver.engine.stats()

    assert stats.phase == "prefill" and stats.phase_age_s >= 0.02
    assert stats.phase_deadline_s is not None and stats.phase_deadline_s >= 30


def test_a_prompt_as_long_as_the_context_is_refused(drive) -> None:
    with pytest.raises(ValueError, match=r"must be < 12 tokens\. Given: 12"):
        drive(context_tokens=12).ask("x" * 12)


class Rule:
    """A grammar that allows one text and then the end."""

    failed = ""

    def __init__(self, ids: list[int]) -> None:
        self.left = ids

    def forced(self):
        return []

    def allowed(self):
        raise AssertionError("the fake runner does not ask")

    def accept(self, token: int) -> bool:
        return bool(self.left) and self.left.pop(0) == token

    def finished(self) -> bool:
        return not self.left


def test_an_answer_ends_where_its_grammar_ends(drive) -> None:
    driver = drive(answer=lambda p, i: "yes, and more")
    rule = Rule(driver.model.vocabulary.encode("yes"))

    text, end = read(driver.ask("q", grammar=rule))

    assert (text, end.reason) == ("yes", FinishReason.STOP)


def test_a_grammar_may_apply_only_after_a_text(drive) -> None:
    driver = drive(answer=lambda p, i: "<think>hm</think>yes, and more")
    rule = Rule(driver.model.vocabulary.encode("yes"))

    assert read(driver.ask("q", grammar=rule, grammar_after="</think>"))[0] == "<think>hm</think>yes"


def test_a_token_against_the_grammar_fails_its_own_request(drive) -> None:
    driver = drive(answer=lambda p, i: "no")

    failed = read(driver.ask("q", grammar=Rule([1])))[1]
    assert failed.kind is Failure.GRAMMAR and "does not fit the grammar" in failed.message
    assert isinstance(read(driver.ask("q", "b"))[1], Done)


def test_endless_repetition_ends_the_answer(drive) -> None:
    driver = drive(answer=lambda p, i: "begin " + "again and " * 200)

    text, end = read(driver.ask("q", loop_window=64))

    assert end.reason is FinishReason.REPETITION and len(text) < 100


def test_an_end_token_may_be_ignored(drive) -> None:
    driver = drive(answer=lambda p, i: "a<|user|>b")

    assert read(driver.ask("q", ignore_eos=True, max_tokens=3))[0] == "ab"
    assert read(driver.ask("q", "r2"))[0] == "a"


def test_deltas_of_many_requests_add_up(drive) -> None:
    driver = drive(slots=8, answer=lambda p, i: "héllo " * 10, queue_size=32)
    streams = [driver.ask("q" * (1 + number % 5), str(number)) for number in range(24)]

    for stream in streams:
        tokens, text = 0, ""
        while isinstance(event := stream.get(timeout=WAIT_S), Delta):
            tokens, text = tokens + event.tokens, text + event.text
        assert isinstance(event, Done) and event.completion_tokens == tokens and text == "héllo " * 10
