"""First come, first served; nobody starves, nothing leaks, and everybody reads only what is theirs."""

from __future__ import annotations

import pytest
from fake_model import FakeRunner, fake_model
from hypothesis import given, settings
from hypothesis import strategies as st

from api.engine.encoder_cache import EncoderCache
from api.engine.kv_cache import KvCache
from api.engine.request import ImageInput, Request, SamplingParams
from api.engine.scheduler import QueueFull, Scheduler
from api.engine.sequence import Sequence, make_sequence

IMAGE = 7
MODEL = fake_model(answer=lambda prompt, pictures: "x" * 200)


def scheduler(
    slots: int = 2, pages: int = 40, page_tokens: int = 4, queue_size: int = 50, pictures: int = 1000
) -> Scheduler:
    return Scheduler(queue_size, slots, KvCache(pages, page_tokens), EncoderCache(pictures))


def sequence(name: str, prompt: list[int] | None = None, pictures: list[ImageInput] | None = None, **fields) -> Sequence:
    tokens = fields.pop("max_tokens", 3)
    request = Request(name, tuple(prompt or [1]), SamplingParams(max_tokens=tokens), tuple(pictures or ()), **fields)
    return make_sequence(request, lambda event: None, IMAGE)


def shot(colour: str, tokens: int = 4) -> ImageInput:
    return ImageInput(colour, (1, 2, 2 * tokens), tokens, colour.encode())


class Drive:
    """Takes steps with the fake runner, which checks every page that is read."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.runner = FakeRunner(MODEL.vocabulary, lambda p, i: "x" * 200, page_tokens=scheduler.kv.page_tokens)
        self.finished: list[str] = []

    def step(self, chunk_tokens: int = 100) -> bool:
        for started in self.scheduler.admit():
            assert started.block_table is not None
            self.runner.copy_pages([started.block_table.copy] if started.block_table.copy else [])
            self.runner.begin(started)
        job = self.scheduler.next_encode_task()
        if job and (features := self.runner.encode(job, 1.0)) is not None:
            self.scheduler.encode_done(job, features, 100)
        batch = self.scheduler.batch(chunk_tokens)
        choosing = batch.sampled
        choices = self.runner.compute(batch)
        self.scheduler.computed(batch)
        for one, choice in zip(choosing, choices, strict=True):
            one.append(choice.token)
            if len(one.output_ids) == one.request.sampling.max_tokens:
                self.finished.append(one.request.id)
                self.scheduler.remove(one)
        self.scheduler.check()
        return bool(batch.sequences or job)

    def run(self, chunk_tokens: int = 100) -> list[str]:
        while self.scheduler.has_work:
            self.step(chunk_tokens)
        return self.finished


def test_nothing_to_do_is_no_work() -> None:
    idle = scheduler()

    assert idle.admit() == [] and idle.next_encode_task() is None and idle.batch(100).sequences == ()


def test_a_picture_comes_before_its_prompt_and_the_prompt_before_tokens() -> None:
    drive = Drive(scheduler())
    one = sequence("a", [1, *[IMAGE] * 4, 2], [shot("red")])
    drive.runner.slices = 2
    drive.scheduler.add(one)

    seen = []
    for _ in range(4):
        drive.step()
        seen.append((len(drive.runner.encoded), one.computed, len(one.output_ids)))

    assert seen == [(0, 0, 0), (1, 6, 1), (1, 7, 2), (1, 0, 3)]


def test_those_who_decode_get_a_token_in_every_step_while_a_long_prompt_is_read() -> None:
    drive = Drive(scheduler())
    talking, long = sequence("a", max_tokens=20), sequence("b", [*range(10, 70)])
    drive.scheduler.add(talking)
    drive.step()
    drive.scheduler.add(long)

    said = []
    while not long.output_ids:
        drive.step(chunk_tokens=16)
        said.append(len(talking.output_ids))

    assert said == [2, 3, 4, 5]  # 60 tokens are four chunks


def test_text_does_not_wait_for_somebody_elses_picture() -> None:
    drive = Drive(scheduler())
    drive.runner.slices = 50
    drive.scheduler.add(sequence("picture", [*[IMAGE] * 4, 2], [shot("red")]))
    text = sequence("text")
    drive.scheduler.add(text)

    drive.step()

    assert text.output_ids and not drive.runner.encoded


def test_short_prompts_share_a_step() -> None:
    drive = Drive(scheduler(slots=4))
    for number in range(4):
        drive.scheduler.add(sequence(str(number), [number * 10 + n for n in range(5)]))

    drive.step()

    assert len(drive.runner.batches[0].chunks) == 4


def test_who_comes_first_starts_first() -> None:
    drive = Drive(scheduler(slots=1))
    for name in "abc":
        drive.scheduler.add(sequence(name))

    assert drive.run() == ["a", "b", "c"]


def test_a_probe_runs_at_once_though_all_slots_are_taken() -> None:
    drive = Drive(scheduler(slots=2))
    for name in "abcdef":
        drive.scheduler.add(sequence(name, max_tokens=30))
    drive.step()
    drive.scheduler.add(sequence("probe", probe=True))

    assert drive.run()[0] == "probe"


def test_a_probe_does_not_count_in_the_queue_and_one_slot_is_its_own() -> None:
    full = scheduler(slots=1, queue_size=1)
    for name in "ab":
        full.add(sequence(name))
    with pytest.raises(QueueFull):
        full.add(sequence("c"))

    full.add(sequence("probe", probe=True))

    full.admit()
    assert [full.position(name) for name in ("a", "probe", "b")] == [0, 0, 1]


def test_two_probes_do_not_throw_each_other_out_for_ever() -> None:
    drive = Drive(scheduler(slots=2, pages=8, page_tokens=4))
    drive.scheduler.add(sequence("a", [1] * 20))
    drive.step()
    for name in ("p", "q"):
        drive.scheduler.add(sequence(name, [ord(name)] * 20, probe=True))

    assert drive.run() == ["p", "q", "a"]


def test_a_request_that_begins_like_one_being_read_waits_and_shares() -> None:
    drive = Drive(scheduler(slots=3, pages=60))
    prompt = [*range(10, 90)]
    first, second = sequence("a", [*prompt, 1]), sequence("b", [*prompt, 2])
    drive.scheduler.add(first)
    drive.scheduler.add(second)

    drive.run()

    assert (first.cached_tokens, second.cached_tokens) == (0, 80)


def test_the_same_picture_is_encoded_once_for_everybody() -> None:
    drive = Drive(scheduler(slots=4))
    for number in range(4):
        drive.scheduler.add(sequence(str(number), [number + 20, *[IMAGE] * 4, 2], [shot("red")]))

    drive.run()

    assert drive.runner.encoded == ["red"]


def test_a_picture_is_not_encoded_when_its_keys_and_values_are_still_there() -> None:
    drive = Drive(scheduler(pictures=0))
    prompt = [1, *[IMAGE] * 4, 2]
    drive.scheduler.add(sequence("a", prompt, [shot("red")]))
    drive.run()
    drive.scheduler.add(sequence("b", [*prompt, 5, 6], [shot("red")]))
    drive.run()

    assert drive.runner.encoded == ["red"]


def test_pictures_of_two_tenants_are_encoded_twice() -> None:
    drive = Drive(scheduler())
    for salt in ("a", "b"):
        drive.scheduler.add(sequence(salt, [1, *[IMAGE] * 4, 2], [shot("red")], salt=salt))

    drive.run()

    assert drive.runner.encoded == ["red", "red"]


def test_a_picture_without_a_key_is_like_no_other() -> None:
    drive = Drive(scheduler())
    for name in "ab":
        drive.scheduler.add(sequence(name, [1, *[IMAGE] * 4, 2], [ImageInput("red", (1, 2, 8), 4)]))

    drive.run()

    assert drive.runner.encoded == ["red", "red"]


def test_when_pages_run_out_the_youngest_gives_way_and_comes_back() -> None:
    drive = Drive(scheduler(slots=3, pages=12, page_tokens=4))
    for name in "abc":
        drive.scheduler.add(sequence(name, [ord(name)] * 8, max_tokens=24))

    assert drive.run()[0] == "a"
    assert sorted(drive.finished) == ["a", "b", "c"]
    assert drive.scheduler.preemptions > 0


def test_a_prompt_that_does_not_fit_its_pictures_is_refused() -> None:
    for prompt in ([1, 2], [IMAGE, 1, IMAGE], [IMAGE] * 5):
        with pytest.raises(ValueError):
            sequence("a", prompt, [shot("red", 4)])


def test_positions_count_from_the_one_that_runs() -> None:
    one = scheduler(slots=1)
    for name in "abc":
        one.add(sequence(name))
    one.admit()

    assert [one.position(name) for name in ("a", "b", "c", "other")] == [0, 1, 2, None]


PROMPTS = st.lists(st.integers(10, 12), min_size=1, max_size=12)
ARRIVALS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": PROMPTS,
            "picture": st.sampled_from([None, None, "red", "blue"]),
            "max_tokens": st.integers(1, 9),
            "salt": st.sampled_from(["", "other"]),
            "probe": st.sampled_from([False, False, False, True]),
            "after": st.integers(0, 3),  # steps
            "leaves": st.one_of(st.none(), st.integers(0, 6)),  # is aborted so many steps later
        }
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(
    arrivals=ARRIVALS,
    slots=st.integers(1, 4),
    pages=st.integers(8, 20),
    page_tokens=st.integers(3, 5),
    chunk_tokens=st.integers(1, 30),
    picture_bytes=st.sampled_from([0, 100, 1000]),
)
def test_whatever_comes_everybody_ends_once_and_nothing_is_left(
    arrivals, slots: int, pages: int, page_tokens: int, chunk_tokens: int, picture_bytes: int
) -> None:
    drive = Drive(scheduler(slots, pages, page_tokens, pictures=picture_bytes))
    leaving: list[tuple[int, Sequence]] = []
    left, steps = [], 0

    def step() -> None:
        nonlocal steps
        for when, one in leaving:
            if when == steps and one.request.id not in drive.finished:
                drive.scheduler.remove(one)
                left.append(one.request.id)
        drive.step(chunk_tokens)
        steps += 1

    for number, a in enumerate(arrivals):
        prompt = [*a["prompt"], *([IMAGE] * 4 if a["picture"] else [])]
        shots = [shot(a["picture"])] if a["picture"] else []
        fields = {key: a[key] for key in ("max_tokens", "salt", "probe")}
        one = sequence(str(number), prompt, shots, **fields)
        drive.scheduler.add(one)
        if a["leaves"] is not None:
            leaving.append((steps + a["leaves"], one))
        for _ in range(a["after"]):
            step()
    while drive.scheduler.has_work:
        step()
        assert steps < 1000, "somebody starves"

    assert sorted([*drive.finished, *left], key=int) == [str(number) for number in range(len(arrivals))]
    drive.scheduler.check()
    assert drive.scheduler.kv.used_tokens == 0


def test_a_batch_can_be_halved_down_to_single_tokens() -> None:
    drive = Drive(scheduler(slots=4))
    for number in range(3):
        drive.scheduler.add(sequence(str(number), [number + 10] * 8))
    drive.scheduler.admit()
    batch = drive.scheduler.batch(100)

    def pieces(batch, cut: bool) -> list:
        halves = batch.halves(cut)
        return [batch] if not halves else [piece for half in halves for piece in pieces(half, cut)]

    assert [len(piece.sequences) for piece in pieces(batch, cut=False)] == [1, 1, 1]
    assert [piece.chunk_tokens for piece in pieces(batch, cut=True)] == [1] * 24
