"""The encoder cache: features of encoded images by content, least recently used first out, within a byte budget.

Values are opaque: no tensors here. A key includes the tenant, so that response times do not reveal the images of others.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

ImageKey = tuple[str, bytes]  # salt, content


class EncoderCache:
    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.hits = 0
        self.queries = 0
        self._items: OrderedDict[ImageKey, tuple[Any, int]] = OrderedDict()

    def get(self, key: ImageKey) -> Any | None:
        self.queries += 1
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        self.hits += 1
        return item[0]

    def put(self, key: ImageKey, value: Any, size_bytes: int) -> None:
        """Store a value, unless it exceeds the whole budget."""
        if key in self._items or size_bytes > self.budget_bytes:
            return
        while self.used_bytes + size_bytes > self.budget_bytes:
            _, (_, freed) = self._items.popitem(last=False)
            self.used_bytes -= freed
        self._items[key] = (value, size_bytes)
        self.used_bytes += size_bytes

    def remove(self, key: ImageKey) -> None:
        """Forget a value; an unknown key is ignored."""
        _, freed = self._items.pop(key, (None, 0))
        self.used_bytes -= freed

    def drop(self) -> None:
        """Forget all values."""
        self._items.clear()
        self.used_bytes = 0

    def check(self) -> None:
        """Raise AssertionError unless the bytes add up."""
        assert self.used_bytes == sum(size for _, size in self._items.values()) <= self.budget_bytes
