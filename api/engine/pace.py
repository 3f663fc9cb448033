"""How fast the engine works: units of work and the seconds they took, since it started."""

from __future__ import annotations

from typing import Any

# Steps that only decode are counted by their rows, each under the first name whose limit is not exceeded.
ROWS = ((1, "1"), (2, "2"), (4, "3-4"), (8, "5-8"), (16, "9-16"), (float("inf"), "17-"))


class PaceCounters:
    """Written by the engine thread; any thread may read `totals`.

    Seconds are wall time of the engine thread. On a GPU that is the time until a step's tokens are read; encoding an
    image only queues its work there, which is waited for in the step that prefills it.
    """

    def __init__(self) -> None:
        # Pairs are replaced as a whole, so that a reader never sees half of an update.
        self._decode: dict[str, tuple[int, float]] = {name: (0, 0.0) for _, name in ROWS}
        self._prefill: tuple[int, float] = (0, 0.0)
        self._vision: tuple[int, float] = (0, 0.0)

    def computed(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """A step has decoded `rows` and prefilled `prompt_tokens`. With both, it counts as a step that prefills."""
        if prompt_tokens:
            self._prefill = _added(self._prefill, prompt_tokens, seconds)
            return
        name = next(name for limit, name in ROWS if rows <= limit)
        self._decode[name] = _added(self._decode[name], 1, seconds)

    def encoded(self, patches: int, seconds: float) -> None:
        """An image of `patches` has been encoded, in one or more slices that took `seconds` together."""
        self._vision = _added(self._vision, patches, seconds)

    def totals(self) -> dict[str, Any]:
        """`decode`: steps and seconds by rows; `prefill`: tokens and seconds; `vision`: patches and seconds."""
        decode = {name: _rounded(pair) for name, pair in self._decode.items()}
        return {"decode": decode, "prefill": _rounded(self._prefill), "vision": _rounded(self._vision)}


def _added(pair: tuple[int, float], units: int, seconds: float) -> tuple[int, float]:
    return pair[0] + units, pair[1] + seconds


def _rounded(pair: tuple[int, float]) -> list[float]:
    return [pair[0], round(pair[1], 6)]
