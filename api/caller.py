"""The caller of a request: the name of its key, for the log, the limits and the labels of metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """`probe`: a health probe, which has permits and a thread of its own."""

    name: str
    probe: bool = False


NOBODY = Caller("-")  # where no key is configured, and on open paths
