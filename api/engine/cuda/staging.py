"""What the host tells the device in a step: one pinned int32 block, one copy.

The block has a field of the same size for each fact about a row, then changes of block tables, then the tokens of prompts.
Floats travel as their bits. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch

from api.engine.cuda.device import Device, Event

ALIGN = 16  # words: pointers at multiples of 16 bytes let a kernel be compiled once
BLOCKS = 3  # a block is written again when the copy of the one before the last is long done
TABLE_CHANGES = 4096  # of one block
# Facts of a row that is decoded or sampled. `given` is its input token, or -1 for the one that was sampled last in `slot`.
ROW_FIELDS = ("given", "slot", "position", "length", "top_k")
PENALTIES = ("repetition", "presence", "frequency")
FLOAT_FIELDS = ("temperature", "top_p", "min_p", *PENALTIES)
# Facts of a chunk of a prompt: its first row, the tokens before it, the slot of its sequence.
CHUNK_FIELDS = ("start", "first", "chunk_slot")
TOKEN_FIELDS = ("ids", "kv_slots", "time", "height", "width")  # of all tokens of a step with prompts


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class Staging:
    """`host[name]` are numpy views of the block that is written now, `device[name]` the tensors it is copied to."""

    def __init__(self, device: Device, place: torch.device | str, rows: int, tokens: int) -> None:
        self.rows, self.tokens = aligned(rows), aligned(tokens)
        self._device = device
        self._fields: dict[str, tuple[int, int]] = {}  # offset and size in words
        self._words = 0
        self._add(("random",), 2 * self.rows)
        self._add((*ROW_FIELDS, *FLOAT_FIELDS), self.rows)
        self._rows_end = self._words
        self._add(("changed", "pages"), TABLE_CHANGES)
        self._changes_end = self._words
        self._add(("sampled_rows", *CHUNK_FIELDS), self.rows)
        self._add(TOKEN_FIELDS, self.tokens)
        self._blocks = [device.pinned(self._words, torch.int32) for _ in range(BLOCKS)]
        self._copied: list[Event | None] = [None] * BLOCKS
        self._turn = 0
        self._views = [self._host_views(block) for block in self._blocks]
        self._target = torch.zeros(self._words, dtype=torch.int32, device=place)
        self.device = {name: self._typed(name, self._target[o : o + s]) for name, (o, s) in self._fields.items()}

    @property
    def host(self) -> dict[str, np.ndarray]:
        return self._views[self._turn]

    def next_block(self) -> None:
        """Take the next block, once the device has copied what it held."""
        self._turn = (self._turn + 1) % BLOCKS
        if (copied := self._copied[self._turn]) is not None:
            copied.wait()

    def copy_to_next_block(self) -> None:
        """Take the next block and go on with what this one holds."""
        held = self._blocks[self._turn]
        self.next_block()
        self._blocks[self._turn].copy_(held)

    def upload(self, changes: int, tokens: int) -> None:
        """Queue the copy of the block, as far as it is used."""
        used = self._words if tokens else self._changes_end if changes else self._rows_end
        self._device.upload(self._target[:used], self._blocks[self._turn][:used])
        self._copied[self._turn] = self._device.record()

    def _add(self, names: Items[str], size: int) -> None:
        for name in names:
            self._fields[name] = (self._words, size)
            self._words += aligned(size)

    def _host_views(self, block: torch.Tensor) -> dict[str, np.ndarray]:
        words = block.numpy()
        types = {"random": np.float64} | dict.fromkeys(FLOAT_FIELDS, np.float32)
        return {name: words[o : o + s].view(types.get(name, np.int32)) for name, (o, s) in self._fields.items()}

    @staticmethod
    def _typed(name: str, words: torch.Tensor) -> torch.Tensor:
        if name == "random":
            return words.view(torch.float64)
        return words.view(torch.float32) if name in FLOAT_FIELDS else words
