"""Tokens to text, one at a time: whole characters only, and stop strings found across token borders.

Knows bytes and text, nothing of models or HTTP.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Feed the bytes of each token; text comes out as soon as it can no longer change."""

    def __init__(self, stop: Sequence[str] = (), skips: tuple[str, str] | None = None) -> None:
        # Malformed bytes become U+FFFD only when they can no longer be completed.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopFinder(stop, skips)

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def feed(self, data: bytes) -> str:
        return self._stops.feed(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        return self._stops.feed(self._decoder.decode(b"", final=True)) + self._stops.finish()


class StopFinder:
    """Passes text through up to, not including, the first stop string.

    Stop strings are not looked for in the white space before the answer, nor in a leading block
    `skips` (opening and closing tag): a model that thinks first must not be stopped by its thoughts.
    """

    def __init__(self, stop: Sequence[str], skips: tuple[str, str] | None = None) -> None:
        self.found = False
        self._stop = tuple(stop)
        self._skips = skips
        self._held = ""
        self._where = "before" if self._stop else "through"

    def feed(self, text: str) -> str:
        if self.found:
            return ""
        if self._where == "through":
            return text
        self._held += text
        out = ""
        while (piece := self._advance()) is not None:
            out += piece
        return out

    def finish(self) -> str:
        rest, self._held = self._held, ""
        return "" if self.found else rest

    def _advance(self) -> str | None:
        """One move of the automaton: text to let out, or None when more input is needed."""
        if self._where == "before":
            return self._before_answer()
        if self._where == "inside":
            return self._inside_block()
        return self._in_answer()

    def _before_answer(self) -> str | None:
        bare = self._held.lstrip()
        if not bare:
            return None
        opening = self._skips[0] if self._skips else ""
        if opening and bare.startswith(opening):
            self._where = "inside"
            return self._let_out(len(self._held) - len(bare) + len(opening))
        if opening and opening.startswith(bare):
            return None
        self._where = "answer"
        return self._let_out(len(self._held) - len(bare))

    def _inside_block(self) -> str | None:
        assert self._skips is not None
        closing = self._skips[1]
        end = self._held.find(closing)
        if end >= 0:
            self._where, self._skips = "before", None
            return self._let_out(end + len(closing))
        free = len(self._held) - held_back(self._held, (closing,))
        return self._let_out(free) if free else None

    def _in_answer(self) -> str | None:
        # The stop string that ends first wins, as if characters came one by one.
        hits = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            out = self._held[: min(hits)[1]]
            self._held = ""
            return out or None
        free = len(self._held) - held_back(self._held, self._stop)
        return self._let_out(free) if free else None

    def _let_out(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out


def held_back(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of one of `tags`."""
    longest = max((len(tag) for tag in tags), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(tag.startswith(tail) for tag in tags):
            return size
    return 0
