"""What one run of the check has seen, as plain data: recorded, replayed and judged without any I/O.

Order of trust: kernel facts (`Process`) > stamps by another thread (`Beat`) > HTTP answers (`Look`, `Answer`)
> GPU readings. Ages and durations are seconds. None means not known, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Moment:
    """When a run looked. `monotonic` counts the same for all processes of one boot and never jumps."""

    wall: float
    monotonic: float
    boot_id: str = ""


@dataclass(frozen=True)
class Process:
    """The kernel's word on what start.sh started.

    `state`: runs, stopped (SIGSTOP), traced (a debugger holds it), stuck (uninterruptible sleep), gone,
    unrecorded (nothing was started here). `port_owner`: ours, stranger, nobody, unknown.
    """

    state: str = "unrecorded"
    pid: int | None = None
    age_s: float | None = None
    port_owner: str = "unknown"
    holder: str = ""
    oom_killed: bool = False

    @property
    def alive(self) -> bool:
        return self.state in ("runs", "stopped", "traced", "stuck")


@dataclass(frozen=True)
class Beat:
    """The server's heartbeat file. `beat_age_s` is the event loop's, `written_age_s` the observer thread's."""

    beat_age_s: float
    written_age_s: float
    state: str = ""
    phase: str = ""
    steps: int | None = None
    pending: int = 0
    no_progress_s: float = 0.0
    deadline_s: float | None = None
    progress: float | None = None


@dataclass(frozen=True)
class Look:
    """One answer of GET /health, or of another engine's metrics. `outcome`: answered, refused, silent, failed."""

    outcome: str
    seconds: float = 0.0
    status: int = 0
    state: str = ""
    phase: str = ""
    steps: int | None = None
    pending: int | None = None
    no_progress_s: float | None = None
    deadline_s: float | None = None
    progress: float | None = None
    reason: str = ""
    detail: str = ""

    @property
    def answered(self) -> bool:
        return self.outcome == "answered"


@dataclass(frozen=True)
class Answer:
    """A real question. `kind`: text or picture.

    `outcome`: right, wrong, rejected (an HTTP error), cut (no end marker), silent, refused, failed, skipped, and
    credited: a user's own question was answered a moment ago, so none was asked.
    """

    kind: str
    outcome: str
    seconds: float = 0.0
    status: int = 0
    expected: str = ""
    text: str = ""
    detail: str = ""
    first_token_s: float | None = None
    longest_gap_s: float | None = None

    @property
    def good(self) -> bool:
        return self.outcome in ("right", "credited")


@dataclass(frozen=True)
class ApiEvidence:
    """`last` is a second look at /health, taken where a question got no answer: did the engine move meanwhile?"""

    url: str
    process: Process = Process()
    beat: Beat | None = None
    first: Look = Look("silent")
    answers: tuple[Answer, ...] = ()
    last: Look | None = None
    hardware: tuple[str, ...] = ()
    blind: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Exchange:
    """One HTTP or WebSocket exchange with the page. `outcome` as in Look."""

    outcome: str
    seconds: float = 0.0
    status: int = 0
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.outcome == "answered" and self.status in (101, 200)


@dataclass(frozen=True)
class PageEvidence:
    """`script` runs the whole page and is asked for only now and then; `front` goes through the reverse proxy."""

    url: str
    process: Process = Process()
    health: Exchange = Exchange("silent")
    websocket: Exchange | None = None
    script: Exchange | None = None
    front: Exchange | None = None
    blind: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def api_from_dict(raw: Mapping[str, Any]) -> ApiEvidence:
    """A recorded trace back into evidence. Raises TypeError for a field that does not exist."""
    parts: dict[str, Any] = dict(raw)
    parts["process"] = Process(**parts.get("process") or {})
    parts["beat"] = Beat(**parts["beat"]) if parts.get("beat") else None
    parts["first"] = Look(**parts["first"])
    parts["last"] = Look(**parts["last"]) if parts.get("last") else None
    parts["answers"] = tuple(Answer(**answer) for answer in parts.get("answers") or ())
    parts["hardware"] = tuple(parts.get("hardware") or ())
    return ApiEvidence(**parts)
