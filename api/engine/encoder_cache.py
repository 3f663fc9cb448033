"""Encoded images, kept by content within a byte budget; the least recently used go first.

Opaque values: no tensors here. A key holds the tenant too, so nobody learns from the speed of an
answer what somebody else has shown.
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
        found = self._items.get(key)
        if found is None:
            return None
        self._items.move_to_end(key)
        self.hits += 1
        return found[0]

    def put(self, key: ImageKey, value: Any, size_bytes: int) -> None:
        """Keep a value, if it fits at all."""
        if key in self._items or size_bytes > self.budget_bytes:
            return
        while self.used_bytes + size_bytes > self.budget_bytes:
            _, (_, freed) = self._items.popitem(last=False)
            self.used_bytes -= freed
        self._items[key] = (value, size_bytes)
        self.used_bytes += size_bytes

    def clear(self) -> None:
        self._items.clear()
        self.used_bytes = 0

    def check(self) -> None:
        assert self.used_bytes == sum(size for _, size in self._items.values()) <= self.budget_bytes
