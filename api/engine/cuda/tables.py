"""Block tables on the device: one row for each slot, changed where the host's have changed. Engine thread only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from api.engine.kv_cache import BlockTable
from api.engine.sequence import Sequence


@dataclass
class _Known:
    """What the device has of a sequence's table."""

    table: BlockTable
    pages: int
    shared: int


class DeviceTables:
    """`tables` [slots, width] int32. Entries beyond a sequence's pages are of its predecessors and must not be read, or
    `unused` if the slot never had one."""

    def __init__(self, slots: int, width: int, unused: int, place: torch.device | str) -> None:
        self.tables = torch.full((slots, width), unused, dtype=torch.int32, device=place)
        self._width, self._unused = width, unused
        self._known: dict[int, _Known] = {}

    def changes(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray] | None:
        """Flat indices into `tables` and their new pages, once: they count as written. None if nothing has changed.

        A page of a table changes when another sequence has cached the same content first; all before are then shared.
        """
        table, slot = sequence.block_table, sequence.slot
        assert table is not None and slot is not None
        known = self._known.get(slot)
        if known is None or known.table is not table:
            known = self._known[slot] = _Known(table, 0, 0)
        if known.pages == len(table.pages) and known.shared == len(table.shared):
            return None
        start = min(known.shared, known.pages) if known.shared != len(table.shared) else known.pages
        known.pages, known.shared = len(table.pages), len(table.shared)
        pages = np.array(table.pages[start:], dtype=np.int32)
        return slot * self._width + np.arange(start, start + len(pages), dtype=np.int32), pages

    def forget(self) -> None:
        """Write every table again."""
        self._known.clear()
