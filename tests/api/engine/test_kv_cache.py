"""Pages are shared by content, never by accident, and none is lost in any order of calls."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from api.engine.kv_cache import BlockTable, Key, KvCache


def stored(kv: KvCache, keys: list[Key], salt: str = "") -> BlockTable:
    block_table = kv.allocate(salt, keys)
    assert block_table is not None
    kv.store(block_table, keys, len(keys))
    return block_table


def finish(kv: KvCache, keys: list[Key], salt: str = "") -> None:
    kv.free(stored(kv, keys, salt), keys)
    kv.check()


def test_a_common_prefix_is_shared_up_to_the_last_token() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(11)])

    block_table = kv.allocate("", [*range(11), 90, 91])

    assert block_table is not None and block_table.cached_tokens == 11
    assert block_table.copy is not None and block_table.copy.tokens == 3 and block_table.copy.target == block_table.pages[2]


def test_the_last_token_is_always_computed_for_its_logits() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(8)])

    block_table = kv.allocate("", [*range(8)])

    assert block_table is not None and block_table.cached_tokens == 7


def test_requests_that_run_at_the_same_time_share_full_pages() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    first = stored(kv, [*range(9)])

    second = kv.allocate("", [*range(8), 50])

    assert second is not None and second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    kv.check()


def test_the_same_content_computed_twice_is_stored_once() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    one, two = kv.allocate("", [*range(9)]), kv.allocate("", [*range(9)])
    assert one is not None and two is not None

    kv.store(one, [*range(9)], 9)
    kv.store(two, [*range(9)], 9)

    assert one.pages[:2] == two.pages[:2]
    kv.check()


def test_images_are_distinguished_by_content_not_by_placeholders() -> None:
    kv = KvCache(pages=20, page_tokens=4)
    finish(kv, [1, *[b"red"] * 8, 2])

    other = kv.allocate("", [1, *[b"blue"] * 8, 2])

    assert other is not None and other.cached_tokens == 1


def test_tenants_share_nothing() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(9)], salt="a")

    block_table = kv.allocate("b", [*range(9)])

    assert block_table is not None and block_table.cached_tokens == 0


def test_allocation_fails_without_free_pages_and_loses_none() -> None:
    kv = KvCache(pages=4, page_tokens=4)
    first = stored(kv, [*range(12)])

    assert kv.allocate("", [*range(50, 58)]) is None
    kv.check()
    kv.free(first, [*range(12)])
    assert kv.allocate("", [*range(50, 58)]) is not None


def test_the_least_recently_used_page_is_evicted() -> None:
    kv = KvCache(pages=4, page_tokens=4)
    finish(kv, [*range(8)])
    finish(kv, [*range(20, 28)])
    finish(kv, [*range(8)])  # used again

    stored(kv, [*range(40, 48)])

    again = kv.allocate("", [*range(8)])
    assert again is not None and again.cached_tokens == 7
    assert kv.allocate("", [*range(20, 28)]) is None


def test_pages_of_a_failed_request_are_not_cached() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    block_table = kv.allocate("", [*range(6)])
    assert block_table is not None
    kv.free(block_table, [*range(6)], keep=False)

    again = kv.allocate("", [*range(6)])

    assert again is not None and again.cached_tokens == 0


def test_a_block_table_freed_before_its_copy_caches_no_garbage() -> None:
    kv = KvCache(pages=10, page_tokens=4)
    finish(kv, [*range(6)])
    block_table = kv.allocate("", [*range(6), 7, 8])
    assert block_table is not None and block_table.copy is not None

    kv.free(block_table, [*range(6), 7, 8])

    kv.check()
    again = kv.allocate("", [*range(6), 9])
    assert again is not None and again.copy is not None and again.copy.source != block_table.copy.target


def test_the_trees_of_evicted_tenants_are_dropped() -> None:
    kv = KvCache(pages=4, page_tokens=4)
    for number in range(200):
        finish(kv, [*range(9)], salt=str(number))

    assert len(kv._roots) <= 4 and len(kv._by_age) < 100


def test_distrusted_pages_and_all_that_build_on_them_are_found_by_nobody() -> None:
    kv = KvCache(pages=12, page_tokens=4)
    finish(kv, [*range(8), 50, 51, 52, 53])  # builds on the first page of what follows
    broken, neighbour = stored(kv, [*range(9)]), stored(kv, [*range(8), 70])

    kv.distrust(broken)
    kv.free(broken, [*range(9)], keep=False)

    kv.check()
    again = kv.allocate("", [*range(8), 50, 51, 52, 53, 54])
    assert again is not None and again.cached_tokens == 0
    assert not set(again.pages) & set(neighbour.pages)  # those that run keep what they use
    kv.free(neighbour, [*range(8), 70])
    kv.check()
    assert kv.allocate("", [*range(8), 71]).cached_tokens == 0
    used = kv.to_clear.copy()
    assert set(used) >= set(again.pages) & set(broken.pages)  # cleared before their next use


def test_an_emptied_cache_shares_nothing_and_keeps_what_is_used() -> None:
    kv = KvCache(pages=8, page_tokens=4)
    finish(kv, [*range(9)])
    used = stored(kv, [*range(9)])

    kv.drop()

    kv.check()
    assert kv.used_tokens == 12
    assert kv.allocate("", [*range(9)]).cached_tokens == 0
    kv.free(used, [*range(9)])
    kv.check()


MOVES = st.lists(
    st.tuples(st.sampled_from(["allocate", "store", "append", "free", "drop", "distrust", "empty"]), st.integers(0, 7), st.integers(1, 20)),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(moves=MOVES, pages=st.integers(2, 12), page_tokens=st.integers(1, 5))
def test_any_order_of_calls_keeps_every_page_accounted_for(moves, pages: int, page_tokens: int) -> None:
    kv = KvCache(pages, page_tokens)
    content: dict[tuple[int, int], tuple] = {}  # as a runner writes it: page and index -> all keys so far
    held: dict[int, tuple[BlockTable, list[Key]]] = {}
    for move, who, amount in moves:
        if move == "allocate" and who not in held:
            keys: list[Key] = [(number * (1 + who % 3)) % 5 for number in range(amount)]
            block_table = kv.allocate(str(who % 2), keys)
            if block_table is not None:
                if block_table.copy:
                    for index in range(block_table.copy.tokens):
                        content[block_table.copy.target, index] = content[block_table.copy.source, index]
                for index in range(block_table.cached_tokens):
                    page = block_table.pages[index // page_tokens]
                    assert content[page, index % page_tokens] == (who % 2, *keys[: index + 1])
                held[who] = (block_table, keys)
        elif move == "empty":
            kv.drop()
        elif who in held:
            block_table, keys = held[who]
            if move == "distrust":
                kv.distrust(block_table)
                for page in block_table.pages:  # nobody may find them any more
                    content |= {(page, index): ("wrong",) for index in range(page_tokens)}
                kv.free(block_table, keys, keep=False)
                del held[who]
            elif move == "store":
                upto = max(block_table.cached_tokens, min(amount, len(keys)))
                for index in range(block_table.cached_tokens, upto):
                    content[block_table.pages[index // page_tokens], index % page_tokens] = (who % 2, *keys[: index + 1])
                if upto >= block_table.tokens:
                    kv.store(block_table, keys, upto)
            elif move == "append" and block_table.tokens == len(keys) and kv.append(block_table, len(keys) + 1):
                keys.append(amount % 5)
            elif move in ("free", "drop"):
                kv.free(block_table, keys, keep=move == "free")
                del held[who]
        kv.check()
    for block_table, keys in held.values():
        kv.free(block_table, keys)
    kv.check()
    assert kv.used_tokens == 0
    assert kv.allocate("other", [*range(-kv.total_tokens, 0)]) is not None  # every idle page can be evicted
