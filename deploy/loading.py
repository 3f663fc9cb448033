"""What start.sh says while the API loads its model, from the body of /health. Standard library only, Python 3.8."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

EVERY_S = 10.0  # between two lines of a download, where they cannot be written over one another


def describe(health: dict[str, Any]) -> str:
    """`43 %`, or the bytes of a download with its rate and its remaining time."""
    download = health.get("download")
    if not isinstance(download, dict):
        return f"{100 * _number(health.get('progress')):.0f} %"
    here, total, rate = (_number(download.get(name)) for name in ("downloaded_bytes", "total_bytes", "bytes_per_s"))
    hub, trouble, remaining = download.get("hub"), download.get("trouble"), download.get("remaining_s")
    if not total:
        text = f"asking {hub} for its files"
    else:
        text = f"{size(here, total)} of {size(total)} from {hub} ({100 * here / total:.0f} %), {size(rate)}/s"
        text += f", {span(_number(remaining))} left" if remaining is not None else ""
    return f"{text}; {trouble}" if trouble else text


def size(number: float, like: float = 0.0) -> str:
    """In decimal units, as hubs and lines are measured; `like`: in the unit of another number."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if max(number, like) >= factor:
            return f"{number / factor:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{number:.0f} B"


def span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


class LoadingLine:
    """Shows how a load goes on: in one line that is written anew on a terminal, in a line at a time elsewhere.

    Goes on without output if the terminal is gone or the reader has ended.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        with contextlib.suppress(OSError, ValueError):
            self._in_place = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown: set[str] = set()  # several may load by turns
        self._at, self._open = -EVERY_S, False

    def show(self, text: str, download: bool) -> None:
        """A download changes with each look, so that elsewhere than on a terminal not every change has a line."""
        now = time.monotonic()
        if text in self._shown or (download and not self._in_place and now - self._at < EVERY_S):
            return
        self._shown.add(text)
        self._at = now
        if self._in_place and download:
            with contextlib.suppress(OSError, ValueError):
                width = os.get_terminal_size(self._stream.fileno()).columns
                text = text[: max(width - 1, 20)]  # a longer one would wrap, and its first part stay
            self._write(f"\r{text}\x1b[K")
            self._open = True
        else:
            self.close()
            self._write(f"{text}\n")

    def close(self) -> None:
        """Whatever is printed next begins a line of its own."""
        if self._open:
            self._write("\n")
        self._open = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
