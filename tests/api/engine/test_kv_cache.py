"""Pages: shared by content, never by accident; none lost, whatever happens in whatever order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from api.engine.kv_cache import Key, KvCache, Lease


def stored(kv: KvCache, keys: list[Key], salt: str = "") -> Lease:
    lease = kv.open(salt, keys)
    assert lease is not None
    kv.store(lease, keys, len(keys))
    return lease


def finish(kv: KvCache, keys: list[Key], salt: str = "") -> None:
    kv.close(stored(kv, keys, salt), keys)
    kv.check()


def test_the_same_beginning_is_shared_to_the_last_token_but_one() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(11)])

    lease = kv.open("", [*range(11), 90, 91])

    assert lease is not None and lease.cached_tokens == 11
    assert lease.copy is not None and lease.copy.tokens == 3 and lease.copy.target == lease.table[2]


def test_the_last_token_is_always_computed_for_its_logits() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(8)])

    lease = kv.open("", [*range(8)])

    assert lease is not None and lease.cached_tokens == 7


def test_requests_that_run_at_the_same_time_share_full_pages() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    first = stored(kv, [*range(9)])

    second = kv.open("", [*range(8), 50])

    assert second is not None and second.table[:2] == first.table[:2]
    assert second.table[2] != first.table[2]
    kv.check()


def test_the_same_content_computed_twice_is_kept_once() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    one, two = kv.open("", [*range(9)]), kv.open("", [*range(9)])
    assert one is not None and two is not None

    kv.store(one, [*range(9)], 9)
    kv.store(two, [*range(9)], 9)

    assert one.table[:2] == two.table[:2]
    kv.check()


def test_pictures_are_told_apart_by_content_though_their_placeholders_are_alike() -> None:
    kv = KvCache(pages=20, page_tokens=4)
    finish(kv, [1, *[b"red"] * 8, 2])

    other = kv.open("", [1, *[b"blue"] * 8, 2])

    assert other is not None and other.cached_tokens == 1


def test_tenants_share_nothing() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(9)], salt="a")

    lease = kv.open("b", [*range(9)])

    assert lease is not None and lease.cached_tokens == 0


def test_without_room_a_request_gets_nothing_and_nothing_is_lost() -> None:
    kv = KvCache(pages=4, page_tokens=4)
    first = stored(kv, [*range(12)])

    assert kv.open("", [*range(50, 58)]) is None
    kv.check()
    kv.close(first, [*range(12)])
    assert kv.open("", [*range(50, 58)]) is not None


def test_the_least_recently_used_gives_way() -> None:
    kv = KvCache(pages=4, page_tokens=4)
    finish(kv, [*range(8)])
    finish(kv, [*range(20, 28)])
    finish(kv, [*range(8)])  # used again

    stored(kv, [*range(40, 48)])

    again = kv.open("", [*range(8)])
    assert again is not None and again.cached_tokens == 7
    assert kv.open("", [*range(20, 28)]) is None


def test_what_failed_is_not_offered_to_anybody() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    lease = kv.open("", [*range(6)])
    assert lease is not None
    kv.close(lease, [*range(6)], keep=False)

    again = kv.open("", [*range(6)])

    assert again is not None and again.cached_tokens == 0


def test_a_lease_closed_before_its_copy_was_made_offers_no_garbage() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(6)])
    lease = kv.open("", [*range(6), 7, 8])
    assert lease is not None and lease.copy is not None

    kv.close(lease, [*range(6), 7, 8])

    kv.check()
    again = kv.open("", [*range(6), 9])
    assert again is not None and again.copy is not None and again.copy.source != lease.copy.target


def test_a_tenant_who_left_leaves_nothing_behind() -> None:
    kv = KvCache(pages=4, page_tokens=4)
    for number in range(200):
        finish(kv, [*range(9)], salt=str(number))

    assert len(kv._roots) <= 4 and len(kv._by_age) < 100


MOVES = st.lists(
    st.tuples(st.sampled_from(["open", "store", "grow", "close", "drop"]), st.integers(0, 7), st.integers(1, 20)),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(moves=MOVES, pages=st.integers(2, 12), page_tokens=st.integers(1, 5))
def test_whatever_happens_every_page_is_in_one_place(moves, pages: int, page_tokens: int) -> None:
    kv = KvCache(pages, page_tokens)
    content: dict[tuple[int, int], tuple] = {}  # what a runner would have written: page, place -> all keys so far
    open_now: dict[int, tuple[Lease, list[Key]]] = {}
    for move, who, amount in moves:
        if move == "open" and who not in open_now:
            keys: list[Key] = [(number * (1 + who % 3)) % 5 for number in range(amount)]
            lease = kv.open(str(who % 2), keys)
            if lease is not None:
                if lease.copy:
                    for place in range(lease.copy.tokens):
                        content[lease.copy.target, place] = content[lease.copy.source, place]
                for place in range(lease.cached_tokens):
                    page = lease.table[place // page_tokens]
                    assert content[page, place % page_tokens] == (who % 2, *keys[: place + 1])
                open_now[who] = (lease, keys)
        elif who in open_now:
            lease, keys = open_now[who]
            if move == "store":
                upto = max(lease.cached_tokens, min(amount, len(keys)))
                for place in range(lease.cached_tokens, upto):
                    content[lease.table[place // page_tokens], place % page_tokens] = (who % 2, *keys[: place + 1])
                if upto >= lease.tokens:
                    kv.store(lease, keys, upto)
            elif move == "grow" and lease.tokens == len(keys) and kv.grow(lease, len(keys) + 1):
                keys.append(amount % 5)
            elif move in ("close", "drop"):
                kv.close(lease, keys, keep=move == "close")
                del open_now[who]
        kv.check()
    for lease, keys in open_now.values():
        kv.close(lease, keys)
    kv.check()
    assert kv.used_tokens == 0
    kv.forget()
    assert kv.cached_tokens == 0
