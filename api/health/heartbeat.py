"""The heartbeat file: the event loop's beat and the engine's progress, written by a thread of its own.

The event loop stamps a beat, the engine counts its steps, and the observer thread here compares both with the
clock and writes `api.heartbeat.json` each second. A reader can judge by it a server that answers no HTTP: an old
`beat_at` with a fresh `written_at` means that the event loop is blocked, both old that the whole process is stopped.
Timestamps are seconds of CLOCK_MONOTONIC, which all processes of a machine share and no clock change affects.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import signal
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from api import __version__
from api.engine.serving import ServingEngine
from api.engine.stats import Stats
from api.health.card_events import CardEvents
from api.health.outcomes import Outcomes
from api.health.watchdog import Watchdog

logger = logging.getLogger(__name__)

FILE_NAME = "api.heartbeat.json"
STACKS_NAME = "api.stacks.txt"
BEAT_EVERY_S = 0.5
WRITE_EVERY_S = 1.0
OLD_PULSE_S = 5.0
READY = ("idle", "busy")  # states in which requests are to be sent here
LOST = ("dead", "stalled")  # states which only a new process ends
PEAK_S = 60  # of which the highest use of the KV cache is noted: the checker looks once a minute
MAX_IN_FLIGHT = 64  # requests listed in the file
READ_UNIT_BYTES = 2**20  # reading less from disks is not a sign that a model is being loaded
# Keys of the file whose names differ from those of Stats.
STATS_KEYS = {
    "prefix_cache_hits": "prefix_hits",
    "prefix_cache_queries": "prefix_queries",
    "encoder_cache_hits": "picture_hits",
    "encoder_cache_queries": "picture_queries",
}
CHECK_FILE = "health.json"  # written by health_check.py at every run


@dataclass(frozen=True)
class Checker:
    """The checker that watches this server, judged by its last report. `state`: watching, silent, never seen."""

    state: str
    last_run_age_s: float | None


@dataclass(frozen=True)
class Pulse:
    """One observation. Ages are seconds; `no_progress_s` counts only while work is pending."""

    loop_lag_s: float
    no_progress_s: float
    deadline_s: float
    checker: Checker


class Heartbeat:
    """Observes the engine and the event loop, and writes the file, in a thread of its own."""

    def __init__(
        self,
        engine: ServingEngine,
        log_dir: Path,
        stall_s: float,
        check_silent_s: float,
        outcomes: Outcomes,
        card_events: CardEvents,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._engine = engine
        self._watchdog = watchdog
        self._outcomes = outcomes
        self._card_events = card_events
        self._log_dir = log_dir
        self._stall_s = stall_s
        self._check_silent_s = check_silent_s
        now = time.monotonic()
        self._beat_at = now
        self._progress_at = now
        self._mark: tuple[Any, ...] = ()
        self._load_moved_at = now
        self._load_mark: tuple[Any, ...] = ()
        self._observed_at = now
        self._write_error = ""
        self.leaving = False
        self._kv_used: deque[int] = deque(maxlen=PEAK_S)
        self._stacks: TextIO | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._observe, name="heartbeat", daemon=True)
        self._pulse = Pulse(0.0, 0.0, stall_s, Checker("never seen", None))
        self._identity = {"pid": os.getpid(), "start_time": _start_time(), "boot_id": _boot_id()}

    def start(self) -> None:
        """Call in the running event loop. From here on SIGUSR1 writes the stacks of all threads to `api.stacks.txt`."""
        with contextlib.suppress(OSError):  # a full or read-only disk must not keep the server from serving
            self._log_dir.mkdir(parents=True, exist_ok=True)
            self._stacks = _open_anew(self._log_dir / STACKS_NAME)
            # faulthandler runs inside the signal handler, without bytecode, and so works while the event loop is blocked.
            faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._beat(asyncio.get_running_loop())
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join(2 * WRITE_EVERY_S)
        if self._stacks is not None:
            faulthandler.unregister(signal.SIGUSR1)
            self._stacks.close()

    @property
    def pulse(self) -> Pulse:
        """The last observation. Any thread may read it. A new one if the observer waits for a disk that does not answer."""
        if time.monotonic() - self._observed_at > OLD_PULSE_S and not self._end.is_set():
            self._pulse = self._take_pulse(self._engine.stats())
        return self._pulse

    def leave(self) -> None:
        """From now on the state is draining, also while the engine still takes requests. Safe in a signal handler."""
        self.leaving = True

    def state(self, stats: Stats) -> str:
        """loading, idle, busy, stalled, draining or dead. Busy and stalled differ by progress, never by latency."""
        if stats.state == "busy" and self._pulse.no_progress_s > self._pulse.deadline_s:
            return "stalled"
        return "draining" if self.leaving and stats.state != "dead" else stats.state

    def _own_state(self, stats: Stats) -> str:
        """Of this process, for its manager: it is well also while an engine behind it stands still."""
        state = self.state(stats)
        return "busy" if state == "stalled" and self._engine.behind() is not None else state

    def report(self, stats: Stats) -> dict[str, Any]:
        """What /health and the file say alike of this process, its users' requests, its pace and its card."""
        return {
            "identity": {**self._identity, "version": __version__},
            "loading_still_s": self._loading_still_s(stats),
            "success_age_s": self._outcomes.success_age_s(),
            "outcomes": self._outcomes.counts(),
            "failed_callers": self._outcomes.failed_callers(),
            "pace": self._engine.pace.totals(),
            "corrupt": self._engine.guard_report(),
            "card_events": self._card_events.recent(),
        }

    def _loading_still_s(self, stats: Stats) -> float:
        if stats.state != "loading":
            return 0.0
        return round(max(0.0, time.monotonic() - self._load_moved_at), 1)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat_at = time.monotonic()
        if not self._end.is_set():
            loop.call_later(BEAT_EVERY_S, self._beat, loop)

    def _observe(self) -> None:
        while not self._end.wait(WRITE_EVERY_S):
            try:
                stats = self._engine.stats()
                self._kv_used.append(stats.kv_used_tokens)
                self._watch_loading(stats)
                self._pulse = self._take_pulse(stats)
                self._observed_at = time.monotonic()
                if self._watchdog is not None:
                    self._watchdog.observe(stats, self._own_state(stats), self._beat_at, self._moved_at(stats))
                self._write(stats)
            except Exception:  # the observer must survive any failure of what it observes
                logger.exception("event=heartbeat_failed")

    def _watch_loading(self, stats: Stats) -> None:
        """Note when anything of the load last moved: a report of the loader, or a read from a disk.

        One tensor may have gigabytes, and is reported only when all of it has been read.
        """
        mark = (stats.phase, stats.progress, stats.load_reports, _bytes_read() // READ_UNIT_BYTES)
        if mark != self._load_mark:
            self._load_mark, self._load_moved_at = mark, time.monotonic()

    def _moved_at(self, stats: Stats) -> float:
        """When the engine last moved. One with nothing to do moves as well, unless what it does of its own accord takes too long."""
        if self._engine.behind() is not None:
            return time.monotonic()  # another process's engine: a new process here would not move it
        if stats.state == "loading":
            return self._load_moved_at
        hangs_idle = stats.phase_deadline_s is not None and stats.phase_age_s > stats.phase_deadline_s
        return 0.0 if hangs_idle and not stats.running + stats.waiting else self._progress_at

    def _take_pulse(self, stats: Stats) -> Pulse:
        now = time.monotonic()
        pending = stats.running + stats.waiting
        mark = (stats.steps, stats.phase, stats.progress)
        if not pending or mark != self._mark:
            self._mark, self._progress_at = mark, now
        return Pulse(
            loop_lag_s=round(max(0.0, now - self._beat_at - BEAT_EVERY_S), 3),
            no_progress_s=round(now - self._progress_at, 3),
            # The engine's estimate may lengthen the limit but never shortens it: on a machine that swaps or is shared,
            # a batch may take far longer than the ones before it and still finish.
            deadline_s=max(stats.phase_deadline_s or 0.0, self._stall_s),
            checker=self._checker(),
        )

    def _checker(self) -> Checker:
        try:
            written = (self._log_dir / CHECK_FILE).stat().st_mtime
        except OSError:
            return Checker("never seen", None)
        age_s = max(0.0, time.time() - written)
        return Checker("silent" if age_s > self._check_silent_s else "watching", round(age_s, 1))

    def _write(self, stats: Stats) -> None:
        now = time.monotonic()
        record = {
            **self._identity,
            "written_at": now,
            "written_time": time.time(),
            "beat_at": self._beat_at,
            "state": self.state(stats),
            **{STATS_KEYS.get(k, k): v for k, v in asdict(stats).items() if k != "state"},
            **{k: v for k, v in asdict(self._pulse).items() if k != "checker"},
            **self.report(stats),
            **({"engine": behind} if (behind := self._engine.behind()) is not None else {}),
            "kv_peak_tokens": max(self._kv_used, default=0),
            "in_flight": self._engine.in_flight()[:MAX_IN_FLIGHT],
        }
        path = self._log_dir / FILE_NAME
        temporary = path.with_suffix(".tmp")
        try:
            # No fsync: a heartbeat must not wait for a slow disk.
            with _open_anew(temporary) as file:
                file.write(json.dumps(record, default=str))
            temporary.replace(path)
            self._write_error = ""
        except OSError as error:
            if not self._write_error:
                logger.error("event=heartbeat_not_written path=%s error=%s", path, error.strerror)
            self._write_error = str(error.strerror)

    @property
    def write_error(self) -> str | None:
        """Why the file cannot be written, for /health."""
        return self._write_error or None


def _open_anew(path: Path) -> TextIO:
    """Opens an empty file for writing. What is in its place and no file, such as a pipe, is removed: opening it would wait.

    Raises OSError.
    """
    if path.exists() and not path.is_file():
        path.unlink()
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o644), "w", encoding="utf-8")


def _start_time() -> int:
    """Clock ticks since boot, as in the pid file: pid and start time together identify a process uniquely."""
    try:
        return int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _bytes_read() -> int:
    """Bytes that this process has had read from disks, mapped files included; 0 if the kernel does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
