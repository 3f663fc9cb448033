"""Who holds which page of the KV cache, and which pages hold a prefix that somebody else can use.

Bookkeeping only: page numbers, no tensors. A page stores the keys and values of `page_tokens`
consecutive tokens. Pages whose content is known hang in a tree, one tree for each tenant: the way
from the root to a page spells the tokens that lead to it, so the same page serves everybody who
asks for the same beginning. An image's tokens are spelled by the image's content key, never by
the placeholder id that all images share. Keys are compared whole; no hash can collide.

Pages that nobody uses stay until their room is needed; the least recently used go first.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

Key = Hashable  # a token id, or an image's content key for each of its tokens

LOOK_AT = 64  # siblings compared to find the longest common part of a page


@dataclass(eq=False, slots=True)
class Node:
    """A page in the tree. The last page of an answer may be partly filled: it has fewer keys."""

    page: int
    keys: tuple[Key, ...]
    parent: Node | None  # None for a root, and for what has been evicted
    children: dict[tuple[Key, ...], Node] = field(default_factory=dict)
    users: int = 0
    used_at: int = 0


@dataclass(frozen=True)
class Copy:
    """The first `tokens` of page `source` are to be copied to page `target`, before anything is computed."""

    source: int
    target: int
    tokens: int


@dataclass(eq=False)
class BlockTable:
    """The pages of one request, in order. The attention reads `pages`."""

    root: Node
    pages: list[int]
    cached_tokens: int  # already stored when the table was allocated
    copy: Copy | None
    shared: list[Node]  # the first pages of the table, as far as they are in the tree
    tokens: int  # known to be stored; the copied ones count once `store` has been called


class KvCache:
    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))  # low numbers first: memory is touched only when needed
        self._roots: dict[Key, Node] = {}
        self._idle = 0  # pages in trees that nobody uses
        self._by_age: list[tuple[int, int, Node]] = []  # heap of idle leaves by last use; entries may be outdated
        self._clock = count(1)
        self._block_tables: set[BlockTable] = set()
        self.hit_tokens = 0
        self.asked_tokens = 0

    @property
    def total_tokens(self) -> int:
        return self.pages * self.page_tokens

    @property
    def used_tokens(self) -> int:
        """In pages that running requests hold; idle prefixes do not count, they give way."""
        return (self.pages - len(self._free) - self._idle) * self.page_tokens

    @property
    def cached_tokens(self) -> int:
        return self._idle * self.page_tokens

    def allocate(self, salt: str, keys: Sequence[Key], spare: int = 0) -> BlockTable | None:
        """Pages for all of `keys`, sharing what is there already.

        At least the last token is left to compute, because its logits are wanted. None if there is no
        room now that would leave `spare` pages for others.
        """
        root = self._roots.get(salt) or Node(-1, (salt,), None)
        shared, partial, matched = self._match(root, keys)
        missing = self._pages_for(len(keys)) - len(shared)
        if missing + spare > len(self._free) + self._idle - sum(node.users == 0 for node in shared):
            return None
        self._roots[salt] = root
        root.users += 1
        for node in shared:
            self._use(node)
        fresh = [self._take() for _ in range(missing)]
        cached = len(shared) * self.page_tokens + matched
        copy = Copy(partial.page, fresh[0], matched) if partial else None
        table = [node.page for node in shared] + fresh
        block_table = BlockTable(root, table, cached, copy, shared, len(shared) * self.page_tokens)
        self._block_tables.add(block_table)
        self.asked_tokens += len(keys)
        self.hit_tokens += cached
        return block_table

    def append(self, block_table: BlockTable, tokens: int) -> bool:
        """Make room for `tokens` in all. False if there is none."""
        missing = self._pages_for(tokens) - len(block_table.pages)
        if missing > len(self._free) + self._idle:
            return False
        block_table.pages += [self._take() for _ in range(missing)]
        return True

    def store(self, block_table: BlockTable, keys: Sequence[Key], tokens: int) -> None:
        """The first `tokens` of `keys` are computed now: offer their full pages to everybody."""
        block_table.tokens = tokens
        size = self.page_tokens
        while (len(block_table.shared) + 1) * size <= tokens:
            place = len(block_table.shared)
            self._offer(block_table, place, tuple(keys[place * size : (place + 1) * size]))

    def free(self, block_table: BlockTable, keys: Sequence[Key], keep: bool = True) -> None:
        """Give all pages back. What they hold stays findable, unless its computation went wrong."""
        if block_table not in self._block_tables:
            return
        self._block_tables.remove(block_table)
        rest = tuple(keys[len(block_table.shared) * self.page_tokens : block_table.tokens])
        if keep and rest and rest not in self._parent(block_table).children:
            self._offer(block_table, len(block_table.shared), rest)
        self._free += block_table.pages[len(block_table.shared) :]
        for node in reversed(block_table.shared):  # leaves first: the beginnings of prompts live longest
            self._release(node)
        block_table.root.users -= 1
        self._prune(block_table.root)

    def forget(self) -> None:
        """Give up every idle prefix."""
        while self._idle:
            self._free.append(self._evict())

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one place and every count is right."""
        nodes = [node for root in self._roots.values() for node in _below(root)]
        private = [page for block_table in self._block_tables for page in block_table.pages[len(block_table.shared) :]]
        places = [*self._free, *(node.page for node in nodes), *private]
        assert sorted(places) == list(range(self.pages)), "a page is lost or held twice"
        assert self._idle == sum(node.users == 0 for node in nodes), "the count of idle pages is wrong"
        users = {id(node): 0 for node in nodes}
        for block_table in self._block_tables:
            assert [node.page for node in block_table.shared] == block_table.pages[: len(block_table.shared)], "table and tree differ"
            for node in block_table.shared:
                users[id(node)] += 1
        assert all(users[id(node)] == node.users for node in nodes), "a count of users is wrong"

    # The tree.

    def _match(self, root: Node, keys: Sequence[Key]) -> tuple[list[Node], Node | None, int]:
        """Full pages that begin `keys`, the page that shares the longest part of what follows, and how much."""
        size, limit = self.page_tokens, len(keys) - 1
        node = root
        shared: list[Node] = []
        while (len(shared) + 1) * size <= limit:
            place = len(shared) * size
            child = node.children.get(tuple(keys[place : place + size]))
            if child is None:
                break
            shared.append(child)
            node = child
        rest = keys[len(shared) * size : min((len(shared) + 1) * size, limit)]
        best, longest = None, 0
        for child in islice(reversed(node.children.values()), LOOK_AT):
            common = _common(child.keys, rest)
            if common > longest:
                best, longest = child, common
        return shared, best, longest

    def _offer(self, block_table: BlockTable, place: int, keys: tuple[Key, ...]) -> None:
        parent = self._parent(block_table)
        known = parent.children.get(keys)
        if known is None:
            known = Node(block_table.pages[place], keys, parent)
            parent.children[keys] = known
            self._idle += 1  # until it is used, in the next line but two
        else:  # somebody else was first: use that page and give ours back
            self._free.append(block_table.pages[place])
            block_table.pages[place] = known.page
        self._use(known)
        block_table.shared.append(known)

    def _parent(self, block_table: BlockTable) -> Node:
        return block_table.shared[-1] if block_table.shared else block_table.root

    def _use(self, node: Node) -> None:
        self._idle -= node.users == 0
        node.users += 1

    def _release(self, node: Node) -> None:
        node.users -= 1
        if node.users == 0:
            self._idle += 1
            node.used_at = next(self._clock)
            self._remember(node)

    # Pages.

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _take(self) -> int:
        return self._free.pop() if self._free else self._evict()

    def _evict(self) -> int:
        """Take the least recently used page out of its tree."""
        while True:
            used_at, _, node = heapq.heappop(self._by_age)
            if self._is_evictable(node, used_at):
                break
        parent = node.parent
        assert parent is not None
        del parent.children[node.keys]
        node.parent = None
        self._idle -= 1
        self._remember(parent)
        self._prune(parent)
        return node.page

    def _remember(self, node: Node) -> None:
        if node.parent is None or node.users or node.children:
            return
        heapq.heappush(self._by_age, (node.used_at, next(self._clock), node))
        if len(self._by_age) > 2 * self._idle + LOOK_AT:  # mostly outdated entries
            self._by_age = [entry for entry in self._by_age if self._is_evictable(entry[2], entry[0])]
            heapq.heapify(self._by_age)

    @staticmethod
    def _is_evictable(node: Node, used_at: int) -> bool:
        """Whether a heap entry still stands for an idle leaf, last used when the entry says."""
        return node.parent is not None and not node.users and not node.children and node.used_at == used_at

    def _prune(self, root: Node) -> None:
        """Drop the tree of a tenant who has nothing here any more."""
        if root.parent is None and not root.users and not root.children:
            self._roots.pop(root.keys[0], None)


def _below(root: Node) -> Iterator[Node]:
    left = [root]
    while left:
        children = left.pop().children.values()
        yield from children
        left += children


def _common(one: Sequence[Key], other: Sequence[Key]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
