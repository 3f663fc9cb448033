"""The limits of admission by requests, tokens and keys, and their release."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from api.caller import Caller
from api.errors import ServingError
from api.requests.admission import LARGEST_BODIES, LARGEST_BODIES_OF_KEY, PROBES, Admission
from settings import Settings

ANN, BEN, PROBE = Caller("ann"), Caller("ben"), Caller("probe", probe=True)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(act) -> ServingError:
    with pytest.raises(ServingError) as caught:
        act()
    assert caught.value.retry_after_s and caught.value.retry_after_s > 0
    return caught.value


def test_the_queue_and_the_slots_limit_requests() -> None:
    admission = Admission(Settings(queue_size=2), lambda: 3)
    permits = [admission.admit(ANN) for _ in range(5)]

    error = refusal(lambda: admission.admit(BEN))

    assert (error.status, error.code) == (503, "queue_full")
    permits[0].release()
    admission.admit(BEN)


def test_probes_have_permits_of_their_own() -> None:
    admission = Admission(Settings(queue_size=1))
    for _ in range(2):
        admission.admit(ANN)

    probes = [admission.admit(PROBE) for _ in range(PROBES)]
    for probe in probes:
        probe.take_tokens(10**9)

    assert admission.active == 2
    assert refusal(lambda: admission.admit(PROBE)).code == "queue_full"


def test_bytes_of_images_are_limited_and_given_back() -> None:
    admission = Admission(Settings(queue_image_bytes=100))
    large, small = admission.admit(ANN), admission.admit(ANN)
    large.take_image_bytes(500)

    error = refusal(lambda: small.take_image_bytes(60))

    assert (error.status, error.code) == (503, "queue_full")
    assert "<= 100 bytes of images may be under way. Given: 60" in error.message
    assert "500" not in error.message  # the size of another's picture
    small.take_image_bytes(0)  # text is not refused for others' images
    large.keep_image_bytes(40)  # its pixels are encoded
    small.take_image_bytes(60)
    for permit in (large, small, small):
        permit.release()
    assert admission.image_bytes == admission.active == 0


def test_without_a_setting_images_get_a_part_of_the_memory() -> None:
    assert Admission(Settings()).queue_image_bytes >= 256 * 2**20


def test_tokens_are_limited_but_a_single_request_is_always_admitted() -> None:
    admission = Admission(Settings(queue_tokens=100))
    large, small = admission.admit(ANN), admission.admit(ANN)
    large.take_tokens(5_000)

    error = refusal(lambda: small.take_tokens(1))

    assert error.status == 503 and "<= 100 tokens" in error.message and "5000 are. Given: 1" in error.message
    large.release()
    small.take_tokens(60)
    assert admission.tokens == 60


def test_the_rate_of_a_key_is_limited() -> None:
    clock = Clock()
    admission = Admission(Settings(key_requests_per_minute=2), clock=clock)
    admission.admit(ANN).release()
    clock.now += 20
    admission.admit(ANN).release()

    error = refusal(lambda: admission.admit(ANN))

    assert (error.status, error.code, error.retry_after_s) == (429, "rate_limit_exceeded", 40)
    admission.admit(BEN).release()
    admission.admit(PROBE).release()
    clock.now += 40
    admission.admit(ANN).release()


def test_the_concurrency_of_a_key_is_limited_and_counts_choices() -> None:
    admission = Admission(Settings(key_concurrency=3))
    permit = admission.admit(ANN)
    permit.take_requests(2)

    error = refusal(lambda: admission.admit(ANN))

    assert (error.status, error.code) == (429, "concurrency_limit_exceeded")
    admission.admit(BEN)
    permit.release()
    admission.admit(ANN).take_requests(2)


def test_a_permit_is_released_once_and_completely() -> None:
    admission = Admission(Settings())
    permit = admission.admit(ANN)
    permit.take_requests(3)
    permit.take_tokens(70)
    probe = admission.admit(PROBE)
    assert (admission.active, admission.tokens, admission.probes) == (4, 70, 1)

    for _ in range(3):
        permit.release()
        probe.release()

    assert (admission.active, admission.tokens, admission.probes) == (0, 0, 0)


def test_checking_takes_no_permit_and_does_not_count_towards_the_rate() -> None:
    clock = Clock()
    admission = Admission(Settings(queue_size=1, key_requests_per_minute=2), clock=clock)
    for _ in range(5):
        admission.check(ANN)
    assert admission.active == 0
    admission.admit(ANN)
    admission.admit(ANN)

    assert refusal(lambda: admission.check(ANN)).code == "rate_limit_exceeded"
    assert refusal(lambda: admission.check(BEN)).code == "queue_full"


def test_the_bytes_of_arriving_bodies_are_limited_in_total() -> None:
    admission = Admission(Settings(max_body_bytes=100))
    with ExitStack() as stack:
        for name in ("ann", "ben"):
            stack.enter_context(admission.arriving(Caller(name))).add(LARGEST_BODIES * 50)

        error = refusal(lambda: admission.arriving(Caller("cid")).add(1))

        assert (error.status, error.code) == (503, "queue_full") and "<= 400 bytes" in error.message
        with admission.arriving(PROBE) as probe:
            probe.add(10)
            assert admission.arriving_bytes == 410
    assert admission.arriving_bytes == 0
    with admission.arriving(ANN) as body:
        body.add(100)


def test_arriving_bodies_of_one_key_do_not_block_others() -> None:
    admission = Admission(Settings(max_body_bytes=100))
    with admission.arriving(ANN) as first, admission.arriving(ANN) as second:
        first.add(LARGEST_BODIES_OF_KEY * 100 - 1)
        second.add(1)

        error = refusal(lambda: second.add(1))

        assert (error.status, error.code) == (429, "arriving_limit_exceeded") and "<= 200 bytes" in error.message
        with admission.arriving(BEN) as other:
            other.add(100)
    with admission.arriving(ANN) as again:
        again.add(100)
    assert admission.arriving_bytes == 0
