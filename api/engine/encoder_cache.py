"""The encoder cache: features of encoded images by content, least recently used first out, within a byte budget.

What sequences hold until their image tokens are computed is in the budget too, whether it is in the cache or not: letting
go of it here would free nothing. Values are opaque: no tensors here. A key includes the tenant, so that response times do not reveal the images of others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

ImageKey = tuple[str, bytes]  # salt, content
Held = Mapping[ImageKey, int]  # bytes of the features that sequences hold, by image


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

    def put(self, key: ImageKey, value: Any, size_bytes: int, held: Held) -> None:
        """Store a value, unless the budget has no room for it beside what is `held`."""
        others = {other: size for other, size in held.items() if other != key}
        if key in self._items or not self.make_room(size_bytes, others):
            return
        self._items[key] = (value, size_bytes)
        self.used_bytes += size_bytes

    def make_room(self, size_bytes: int, held: Held) -> bool:
        """Forget values that nobody holds until there is room for so many bytes; False, and nothing forgotten, if there
        cannot be."""
        if sum(held.values()) + size_bytes > self.budget_bytes:
            return False
        outside = sum(size for key, size in held.items() if key not in self._items)
        for key in [key for key in self._items if key not in held]:
            if self.used_bytes + outside + size_bytes <= self.budget_bytes:
                break
            self.remove(key)
        return True

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
