"""The engine's state and counters, a snapshot that any thread may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["loading", "idle", "busy", "draining", "dead"]
Phase = Literal["loading", "warm-up", "idle", "check", "vision", "prefill", "decode", "draining", "dead"]


@dataclass(frozen=True)
class Download:
    """A model on its way from a hub. `hub`: its name and address. `file`: the one whose bytes came last.

    `bytes_per_s`: over the last seconds. `remaining_s`: at this rate; None while nothing comes. `trouble`: why nothing comes,
    or why the files come from another hub than the one asked for; empty if there is none.
    """

    hub: str
    file: str
    downloaded_bytes: int
    total_bytes: int
    bytes_per_s: float
    remaining_s: float | None
    trouble: str


@dataclass(frozen=True)
class Stats:
    state: State
    progress: float
    phase: Phase
    running: int
    waiting: int
    steps: int
    last_step_age_s: float | None
    last_step_s: float | None
    reason: str | None
    phase_age_s: float = 0.0
    phase_deadline_s: float | None = None  # a longer phase means that the engine hangs; None: no limit
    slots: int = 1
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    prefix_cache_hits: int = 0  # prompt tokens found in the prefix cache
    prefix_cache_queries: int = 0  # prompt tokens looked up
    encoder_cache_hits: int = 0
    encoder_cache_queries: int = 0
    preemptions: int = 0
    load_reports: int = 0  # of the loader, each time that bytes of a download or a part of the model have come
    download: Download | None = None  # while a model is being downloaded

    @property
    def kv_usage(self) -> float:
        """The part of the KV cache in use, 0 to 1."""
        return self.kv_used_tokens / self.kv_total_tokens if self.kv_total_tokens else 0.0
