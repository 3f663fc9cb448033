"""First come, first served; no request starves, nothing leaks, and every read is of the right pages."""

from __future__ import annotations

import pytest
from fake_model import FakeRunner, fake_model
from hypothesis import given, settings
from hypothesis import strategies as st

from api.engine.encoder_cache import EncoderCache
from api.engine.kv_cache import KvCache
from api.engine.request import ImageInput, Request, SamplingParams
from api.engine.scheduler import Packing, QueueFull, Scheduler
from api.engine.sequence import Sequence, make_sequence

IMAGE = 7
MODEL = fake_model(answer=lambda prompt, images: "x" * 200)


def scheduler(
    slots: int = 2, pages: int = 40, page_tokens: int = 4, queue_size: int = 50, cache_bytes: int = 1000
) -> Scheduler:
    return Scheduler(queue_size, slots, KvCache(pages, page_tokens), EncoderCache(cache_bytes))


def sequence(name: str, prompt: list[int] | None = None, images: list[ImageInput] | None = None, **fields) -> Sequence:
    tokens = fields.pop("max_tokens", 3)
    request = Request(name, tuple(prompt or [1]), SamplingParams(max_tokens=tokens), tuple(images or ()), **fields)
    return make_sequence(request, lambda event: None, IMAGE)


def image(colour: str, tokens: int = 4) -> ImageInput:
    return ImageInput(colour, (1, 2, 2 * tokens), tokens, colour.encode())


class Drive:
    """Runs steps with the fake runner, which checks every page that it reads."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.runner = FakeRunner(MODEL.vocabulary, lambda p, i: "x" * 200, page_tokens=scheduler.kv.page_tokens)
        self.finished: list[str] = []

    def step(self, chunk_tokens: int = 100) -> bool:
        for started in self.scheduler.admit():
            assert started.block_table is not None
            self.runner.copy_pages([started.block_table.copy] if started.block_table.copy else [])
            self.runner.begin(started)
        task = self.scheduler.next_encode_task()
        if task and (features := self.runner.encode(task, 1.0)) is not None:
            self.scheduler.encode_done(task, features, [100] * len(features))
        batch = self.scheduler.batch(chunk_tokens)
        tokens = self.runner.compute(batch)
        self.scheduler.computed(batch)
        for one, sampled in zip(batch.sampled, tokens, strict=True):
            one.append(sampled.token)
            if len(one.output_ids) == one.request.sampling.max_tokens:
                self.finished.append(one.request.id)
                self.scheduler.remove(one)
        self.scheduler.check()
        return bool(batch.sequences or task)

    def run(self, chunk_tokens: int = 100) -> list[str]:
        while self.scheduler.has_work:
            self.step(chunk_tokens)
        return self.finished


def test_nothing_to_do_is_no_work() -> None:
    idle = scheduler()

    assert idle.admit() == [] and idle.next_encode_task() is None and idle.batch(100).sequences == ()


def test_images_are_encoded_before_prefill_and_decode() -> None:
    drive = Drive(scheduler())
    one = sequence("a", [1, *[IMAGE] * 4, 2], [image("red")])
    drive.runner.slices = 2
    drive.scheduler.add(one)

    seen = []
    for _ in range(4):
        drive.step()
        seen.append((len(drive.runner.encoded), one.computed, len(one.output_ids)))

    assert seen == [(0, 0, 0), (1, 6, 1), (1, 7, 2), (1, 0, 3)]


def test_decoding_continues_in_every_step_of_a_long_prefill() -> None:
    drive = Drive(scheduler())
    decoding, long = sequence("a", max_tokens=20), sequence("b", [*range(10, 70)])
    drive.scheduler.add(decoding)
    drive.step()
    drive.scheduler.add(long)

    lengths = []
    while not long.output_ids:
        drive.step(chunk_tokens=16)
        lengths.append(len(decoding.output_ids))

    assert lengths == [2, 3, 4, 5]  # 60 tokens are four chunks


def test_text_does_not_wait_for_another_requests_image() -> None:
    drive = Drive(scheduler())
    drive.runner.slices = 50
    drive.scheduler.add(sequence("image", [*[IMAGE] * 4, 2], [image("red")]))
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


def test_requests_start_in_order_of_arrival() -> None:
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


def test_probes_do_not_preempt_each_other_forever() -> None:
    drive = Drive(scheduler(slots=2, pages=8, page_tokens=4))
    drive.scheduler.add(sequence("a", [1] * 20))
    drive.step()
    for name in ("p", "q"):
        drive.scheduler.add(sequence(name, [ord(name)] * 20, probe=True))

    assert drive.run() == ["p", "q", "a"]


def test_a_request_waits_for_a_shared_prefix_being_prefilled() -> None:
    drive = Drive(scheduler(slots=3, pages=60))
    prompt = [*range(10, 90)]
    first, second = sequence("a", [*prompt, 1]), sequence("b", [*prompt, 2])
    drive.scheduler.add(first)
    drive.scheduler.add(second)

    drive.run()

    assert (first.cached_tokens, second.cached_tokens) == (0, 80)


def test_a_request_that_waits_for_a_prefix_does_not_hold_up_those_behind() -> None:
    drive = Drive(scheduler(slots=3, pages=60))
    prompt = [*range(10, 90)]
    names = {"first": [*prompt, 1], "waits": [*prompt, 2], "behind": [3], "last": [4]}
    for name, tokens in names.items():
        drive.scheduler.add(sequence(name, tokens, max_tokens=20))

    drive.step(chunk_tokens=20)

    running = {one.request.id for one in drive.scheduler.running_sequences()}
    assert running == {"first", "behind"}  # the third slot is kept for the one that waits
    while drive.scheduler.waiting:
        drive.step(chunk_tokens=20)
    assert drive.finished == [] or drive.finished[0] in ("first", "behind")
    drive.run()
    assert sorted(drive.finished) == sorted(names)


def test_text_before_an_image_is_prefilled_beside_others_while_it_is_encoded() -> None:
    drive = Drive(scheduler(slots=3))
    drive.runner.slices = 5
    drive.scheduler.add(sequence("decodes", [1], max_tokens=30))
    drive.step()
    asked = sequence("asked", [*range(20, 40), *[IMAGE] * 4, 2], [image("red")])
    drive.scheduler.add(asked)

    drive.step()

    assert drive.runner.encoded == [] and asked.computed == 20
    drive.run()
    assert drive.runner.encoded == ["red"] and len(asked.output_ids) == 3


def test_the_same_image_is_encoded_once() -> None:
    drive = Drive(scheduler(slots=4))
    for number in range(4):
        drive.scheduler.add(sequence(str(number), [number + 20, *[IMAGE] * 4, 2], [image("red")]))

    drive.run()

    assert drive.runner.encoded == ["red"]


def test_an_image_in_the_prefix_cache_is_not_encoded() -> None:
    drive = Drive(scheduler(cache_bytes=0))
    prompt = [1, *[IMAGE] * 4, 2]
    drive.scheduler.add(sequence("a", prompt, [image("red")]))
    drive.run()
    drive.scheduler.add(sequence("b", [*prompt, 5, 6], [image("red")]))
    drive.run()

    assert drive.runner.encoded == ["red"]


def test_an_image_of_two_tenants_is_encoded_twice() -> None:
    drive = Drive(scheduler())
    for salt in ("a", "b"):
        drive.scheduler.add(sequence(salt, [1, *[IMAGE] * 4, 2], [image("red")], salt=salt))

    drive.run()

    assert drive.runner.encoded == ["red", "red"]


def test_an_image_without_a_key_is_not_shared() -> None:
    drive = Drive(scheduler())
    for name in "ab":
        drive.scheduler.add(sequence(name, [1, *[IMAGE] * 4, 2], [ImageInput("red", (1, 2, 8), 4)]))

    drive.run()

    assert drive.runner.encoded == ["red", "red"]


def test_without_free_pages_the_youngest_is_preempted_and_resumes() -> None:
    drive = Drive(scheduler(slots=3, pages=12, page_tokens=4))
    for name in "abc":
        drive.scheduler.add(sequence(name, [ord(name)] * 8, max_tokens=24))

    assert drive.run()[0] == "a"
    assert sorted(drive.finished) == ["a", "b", "c"]
    assert drive.scheduler.preemptions > 0


def test_a_prompt_that_does_not_match_its_images_is_refused() -> None:
    for prompt in ([1, 2], [IMAGE, 1, IMAGE], [IMAGE] * 5):
        with pytest.raises(ValueError):
            sequence("a", prompt, [image("red", 4)])


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
            "image": st.sampled_from([None, None, "red", "blue"]),
            "max_tokens": st.integers(1, 9),
            "salt": st.sampled_from(["", "other"]),
            "probe": st.sampled_from([False, False, False, True]),
            "after": st.integers(0, 3),  # steps
            "aborted": st.one_of(st.none(), st.integers(0, 6)),  # so many steps later
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
    cache_bytes=st.sampled_from([0, 100, 1000]),
)
def test_any_arrivals_end_exactly_once_and_free_everything(
    arrivals, slots: int, pages: int, page_tokens: int, chunk_tokens: int, cache_bytes: int
) -> None:
    drive = Drive(scheduler(slots, pages, page_tokens, cache_bytes=cache_bytes))
    aborts: list[tuple[int, Sequence]] = []
    aborted, steps = [], 0

    def step() -> None:
        nonlocal steps
        for when, one in aborts:
            if when == steps and one.request.id not in drive.finished:
                drive.scheduler.remove(one)
                aborted.append(one.request.id)
        drive.step(chunk_tokens)
        steps += 1

    for number, a in enumerate(arrivals):
        prompt = [*a["prompt"], *([IMAGE] * 4 if a["image"] else [])]
        images = [image(a["image"])] if a["image"] else []
        fields = {key: a[key] for key in ("max_tokens", "salt", "probe")}
        one = sequence(str(number), prompt, images, **fields)
        drive.scheduler.add(one)
        if a["aborted"] is not None:
            aborts.append((steps + a["aborted"], one))
        for _ in range(a["after"]):
            step()
    while drive.scheduler.has_work:
        step()
        assert steps < 1000, "a request starves"

    assert sorted([*drive.finished, *aborted], key=int) == [str(number) for number in range(len(arrivals))]
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


def questions(drive: Drive, colours: str, tokens: int = 4, **fields) -> list[Sequence]:
    """One question for each colour."""
    asked = [sequence(c, [ord(c), *[IMAGE] * tokens, 2], [image(c, tokens)], **fields) for c in colours]
    for one in asked:
        drive.scheduler.add(one)
    return asked


def test_images_of_a_step_are_encoded_together_as_far_as_they_are_small() -> None:
    drive = Drive(scheduler(slots=4))
    drive.scheduler.packing = Packing(patches=32)  # an image has 16
    questions(drive, "abc")

    drive.run()

    assert drive.runner.tasks == [["a", "b"], ["c"]]


def test_only_images_of_one_size_are_encoded_together_where_that_is_needed() -> None:
    drive = Drive(scheduler(slots=4))
    drive.scheduler.packing = Packing(patches=1000, alike=True)
    for name, tokens in (("a", 4), ("b", 8), ("c", 4)):
        questions(drive, name, tokens)

    drive.run()

    assert drive.runner.tasks == [["a", "c"], ["b"]]


def test_images_that_fail_together_are_tried_alone() -> None:
    drive = Drive(scheduler(slots=4))
    drive.scheduler.packing = Packing(patches=1000)
    questions(drive, "abc")
    drive.scheduler.admit()
    task = drive.scheduler.next_encode_task()
    assert task is not None and len(task.images) == 3

    assert drive.scheduler.encode_failed(task) == []
    alone = []
    for _ in range(3):
        task = drive.scheduler.next_encode_task()
        assert task is not None and len(task.images) == 1
        alone += drive.scheduler.encode_failed(task)
        drive.scheduler.remove(alone[-1])

    assert [one.request.id for one in alone] == ["a", "b", "c"]


def test_features_that_sequences_hold_are_in_the_budget() -> None:
    """An image has 100 bytes of features, and 300 are allowed."""
    drive = Drive(scheduler(slots=1, pages=60, cache_bytes=300))
    prompt = [token for n in range(6) for token in (n + 10, *[IMAGE] * 4)]
    asked = sequence("a", [*prompt, 2], [image(c) for c in "abcdef"])
    drive.scheduler.add(asked)
    most = 0

    while drive.scheduler.has_work:
        drive.step()
        outside = {asked.spans[i].key for i in asked.features} - set(drive.scheduler.encoder_cache._items)
        most = max(most, drive.scheduler.encoder_cache.used_bytes + 100 * len(outside))

    assert drive.runner.encoded == [*"abcdef"] and len(asked.output_ids) == 3
    assert most == 300


def test_what_a_sequence_holds_is_not_evicted_for_others() -> None:
    drive = Drive(scheduler(slots=2, pages=60, cache_bytes=200))
    questions(drive, "ab")
    drive.run()
    held = sequence("c", [9, *[IMAGE] * 4, 8, *[IMAGE] * 4], [image("a"), image("new")])
    drive.scheduler.add(held)
    drive.scheduler.admit()
    task = drive.scheduler.next_encode_task()
    assert task is not None

    drive.scheduler.encode_done(task, ["new"], [100])

    assert [key[1] for key in drive.scheduler.encoder_cache._items] == [b"a", b"new"]


def test_an_image_larger_than_the_budget_is_encoded_when_nothing_is_held() -> None:
    drive = Drive(scheduler(slots=2, pages=60, cache_bytes=50))
    asked = questions(drive, "ab")

    drive.run()

    assert sorted(drive.runner.encoded) == ["a", "b"] and all(len(one.output_ids) == 3 for one in asked)
    assert drive.scheduler.encoder_cache.used_bytes == 0


def test_patches_are_released_once_encoded_and_made_again_two_at_a_time() -> None:
    drive = Drive(scheduler(slots=1, pages=60))
    images, prompt = [image(c) for c in "abc"], [token for _ in range(3) for token in (8, *[IMAGE] * 4)]
    later = sequence("later", [5, *[IMAGE] * 4], [image("a")])
    released = [*images, later.spans[0].image]
    for one in released:
        one.read = lambda receive: None
    drive.scheduler.add(sequence("a", [*prompt, 2], images))
    drive.scheduler.add(later)
    drive.run()
    assert [one.patches for one in released] == [None] * 4

    drive.scheduler.drop_caches()
    drive.scheduler.add(sequence("b", [*prompt, 2], images))

    assert not drive.step(), "nothing can be done without patches"
    wanted = drive.scheduler.images_to_read()
    assert wanted == images[:2] and drive.scheduler.images_to_read() == [] and drive.scheduler.reading
    for one, colour in zip(wanted, "ab", strict=True):
        one.patches, one.reading = colour, False
    assert drive.scheduler.images_to_read() == [], "these come first"
    drive.step()
    assert drive.scheduler.images_to_read() == images[2:]
    images[2].patches, images[2].reading = "c", False
    assert drive.run()[-1] == "b" and drive.runner.encoded == [*"abc", *"abc"]
