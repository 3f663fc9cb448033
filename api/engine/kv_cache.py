"""Allocation of the KV cache's pages, and the prefix cache that shares them between requests.

Bookkeeping only: page numbers, no tensors. A page stores the keys and values of `page_tokens` consecutive tokens.
The prefix cache is a radix tree of full pages, one tree for each tenant: the path from the root to a page spells the
tokens up to it, so requests with the same prefix share its pages. Image tokens are spelled by the image's content key,
never by the placeholder id that all images share. Keys are compared whole, so there are no hash collisions.

Idle pages stay in the tree until they are needed; the least recently used are evicted first. Not thread-safe; the
engine holds its lock around every call.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

Key = Hashable  # a token id, or an image's content key for each of its tokens

MAX_SIBLINGS = 64  # pages compared to find the longest partial match


@dataclass(eq=False, slots=True)
class Node:
    """A page in the tree. A leaf may be partly filled: it has fewer than `page_tokens` keys."""

    page: int
    keys: tuple[Key, ...]
    parent: Node | None  # None for a root and an evicted node
    children: dict[tuple[Key, ...], Node] = field(default_factory=dict)
    users: int = 0
    used_at: int = 0
    cached: bool = True  # False once it is taken out of the tree while sequences still use it


@dataclass(frozen=True)
class Copy:
    """Copy the first `tokens` of page `source` to page `target`, before the sequence is computed."""

    source: int
    target: int
    tokens: int


@dataclass(eq=False)
class BlockTable:
    """The pages of one sequence, in order."""

    root: Node
    pages: list[int]
    cached_tokens: int  # found in the prefix cache
    copy: Copy | None
    shared: list[Node]  # the leading pages that are in the tree
    tokens: int  # stored so far; copied tokens count once `store` has been called


class KvCache:
    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))  # low numbers first, so that unused memory stays untouched
        self._roots: dict[Key, Node] = {}
        self._idle = 0  # pages in trees without users
        self._by_age: list[tuple[int, int, Node]] = []  # heap of idle leaves by last use; entries may be stale
        self._clock = count(1)
        self._block_tables: set[BlockTable] = set()
        self._outside: set[Node] = set()  # nodes in use that are no longer in a tree
        self._dirty: set[int] = set()  # pages that may hold numbers that are not finite
        self.to_clear: list[int] = []  # those of them that have been allocated again: to be cleared before the next batch
        self.hit_tokens = 0
        self.queried_tokens = 0

    @property
    def total_tokens(self) -> int:
        return self.pages * self.page_tokens

    @property
    def used_tokens(self) -> int:
        """In pages that running requests hold. Idle pages can be evicted and do not count."""
        return (self.pages - len(self._free) - self._idle) * self.page_tokens

    def allocate(self, salt: str, keys: Sequence[Key], spare: int = 0) -> BlockTable | None:
        """Pages for all of `keys`, sharing those of the longest cached prefix. None if fewer than `spare` would be left.

        At least the last token is left to compute, because its logits are needed.
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
        self.queried_tokens += len(keys)
        self.hit_tokens += cached
        return block_table

    def append(self, block_table: BlockTable, tokens: int) -> bool:
        """Extend a block table to `tokens` in all. False if there are not enough pages."""
        missing = self._pages_for(tokens) - len(block_table.pages)
        if missing > len(self._free) + self._idle:
            return False
        block_table.pages += [self._take() for _ in range(missing)]
        return True

    def store(self, block_table: BlockTable, keys: Sequence[Key], tokens: int) -> None:
        """Record that the first `tokens` of `keys` are computed; their full pages join the prefix cache."""
        block_table.tokens = tokens
        size = self.page_tokens
        while self._parent(block_table).cached and (len(block_table.shared) + 1) * size <= tokens:
            index = len(block_table.shared)
            self._insert(block_table, index, tuple(keys[index * size : (index + 1) * size]))

    def free(self, block_table: BlockTable, keys: Sequence[Key], keep: bool = True) -> None:
        """Release all pages; doing so twice is harmless. `keep`: their content is valid and stays in the prefix cache."""
        if block_table not in self._block_tables:
            return
        self._block_tables.remove(block_table)
        rest = tuple(keys[len(block_table.shared) * self.page_tokens : block_table.tokens])
        parent = self._parent(block_table)
        if keep and rest and parent.cached and rest not in parent.children:
            self._insert(block_table, len(block_table.shared), rest)
        self._free += block_table.pages[len(block_table.shared) :]
        for node in reversed(block_table.shared):  # leaves first, so that they are evicted before their prefixes
            self._release(node)
        block_table.root.users -= 1
        self._prune(block_table.root)

    def distrust(self, block_table: BlockTable) -> None:
        """Take its pages, and all pages that build on them, out of the prefix cache: their content may be wrong.

        Sequences that use them keep them until they end, and add nothing to the cache any more.
        """
        self._dirty.update(block_table.pages)
        if block_table.shared and block_table.shared[0].cached:
            self._take_out(block_table.shared[0])
            self._prune(block_table.root)

    def drop(self) -> None:
        """Empty the prefix cache; what sequences use stays theirs until they end."""
        for root in list(self._roots.values()):
            for node in list(root.children.values()):
                self._take_out(node)
            self._prune(root)

    def check(self) -> None:
        """Raise AssertionError unless every page is free, in the tree or in one block table, and every count is right."""
        nodes = [node for root in self._roots.values() for node in _descendants(root)]
        assert all(node.cached for node in nodes), "a distrusted page is in the tree"
        nodes += self._outside
        private = [page for block_table in self._block_tables for page in block_table.pages[len(block_table.shared) :]]
        pages = [*self._free, *(node.page for node in nodes), *private]
        assert sorted(pages) == list(range(self.pages)), "a page is lost or held twice"
        assert self._idle == sum(node.users == 0 for node in nodes), "the count of idle pages is wrong"
        users = {id(node): 0 for node in nodes}
        for block_table in self._block_tables:
            assert [node.page for node in block_table.shared] == block_table.pages[: len(block_table.shared)], "table and tree differ"
            for node in block_table.shared:
                users[id(node)] += 1
        assert all(users[id(node)] == node.users for node in nodes), "a count of users is wrong"

    # The tree.

    def _match(self, root: Node, keys: Sequence[Key]) -> tuple[list[Node], Node | None, int]:
        """The full pages of the longest cached prefix, the page with the longest partial match after it, its tokens."""
        size, limit = self.page_tokens, len(keys) - 1
        node = root
        shared: list[Node] = []
        while (len(shared) + 1) * size <= limit:
            start = len(shared) * size
            child = node.children.get(tuple(keys[start : start + size]))
            if child is None:
                break
            shared.append(child)
            node = child
        rest = keys[len(shared) * size : min((len(shared) + 1) * size, limit)]
        best, longest = None, 0
        for child in islice(reversed(node.children.values()), MAX_SIBLINGS):
            common = common_prefix(child.keys, rest)
            if common > longest:
                best, longest = child, common
        return shared, best, longest

    def _insert(self, block_table: BlockTable, index: int, keys: tuple[Key, ...]) -> None:
        parent = self._parent(block_table)
        node = parent.children.get(keys)
        if node is None:
            node = Node(block_table.pages[index], keys, parent)
            parent.children[keys] = node
            self._idle += 1  # until _use below
        else:  # another sequence has inserted the same content: share its page and free this one
            self._free.append(block_table.pages[index])
            block_table.pages[index] = node.page
        self._use(node)
        block_table.shared.append(node)

    def _parent(self, block_table: BlockTable) -> Node:
        return block_table.shared[-1] if block_table.shared else block_table.root

    def _use(self, node: Node) -> None:
        self._idle -= node.users == 0
        node.users += 1

    def _release(self, node: Node) -> None:
        node.users -= 1
        if node.users == 0 and not node.cached:
            self._outside.remove(node)
            self._free.append(node.page)
        elif node.users == 0:
            self._idle += 1
            node.used_at = next(self._clock)
            self._push_evictable(node)

    def _take_out(self, top: Node) -> None:
        """Take a node and all below it out of its tree; pages without users become free."""
        assert top.parent is not None
        del top.parent.children[top.keys]
        nodes = [top, *_descendants(top)]
        for node in nodes:
            self._dirty.add(node.page)
            node.parent, node.cached = None, False
            node.children = {}
            if node.users:
                self._outside.add(node)
            else:
                self._idle -= 1
                self._free.append(node.page)

    # Pages.

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _take(self) -> int:
        page = self._free.pop() if self._free else self._evict()
        if page in self._dirty:  # masked rows are read and multiplied by 0, which not every number survives
            self._dirty.remove(page)
            self.to_clear.append(page)
        return page

    def _evict(self) -> int:
        """Remove the least recently used leaf from its tree; returns its page."""
        while True:
            used_at, _, node = heapq.heappop(self._by_age)
            if self._is_evictable(node, used_at):
                break
        parent = node.parent
        assert parent is not None
        del parent.children[node.keys]
        node.parent = None
        self._idle -= 1
        self._push_evictable(parent)
        self._prune(parent)
        return node.page

    def _push_evictable(self, node: Node) -> None:
        if node.parent is None or node.users or node.children:
            return
        heapq.heappush(self._by_age, (node.used_at, next(self._clock), node))
        if len(self._by_age) > 2 * self._idle + MAX_SIBLINGS:  # mostly stale entries
            self._by_age = [entry for entry in self._by_age if self._is_evictable(entry[2], entry[0])]
            heapq.heapify(self._by_age)

    @staticmethod
    def _is_evictable(node: Node, used_at: int) -> bool:
        """Whether a heap entry is still valid: an idle leaf, last used at `used_at`."""
        return node.parent is not None and not node.users and not node.children and node.used_at == used_at

    def _prune(self, root: Node) -> None:
        """Drop the tree of a tenant without pages and sequences."""
        if root.parent is None and not root.users and not root.children:
            self._roots.pop(root.keys[0], None)


def _descendants(root: Node) -> Iterator[Node]:
    nodes = [root]
    while nodes:
        children = nodes.pop().children.values()
        yield from children
        nodes += children


def common_prefix(one: Sequence[Key], other: Sequence[Key]) -> int:
    """Number of leading keys that are equal."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
