"""The evidence of one run as plain data that can be recorded, replayed and judged without I/O.

Order of trust: kernel facts (`Process`) > timestamps set by another thread (`Heartbeat`) > HTTP answers (`HealthReply`,
`Answer`) > GPU readings. Ages and durations are in seconds. None means unknown, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

BEAT_STALE_S = 5.0  # a file that is older proves nothing about the engine, because its writer may be stopped


@dataclass(frozen=True)
class Moment:
    """The time of a run. `wall` (Unix seconds) may jump; `monotonic` is CLOCK_MONOTONIC, comparable within `boot_id`."""

    wall: float
    monotonic: float
    boot_id: str = ""


@dataclass(frozen=True)
class Process:
    """What the kernel reports about a process that start.sh started.

    `state`: runs, stopped (SIGSTOP), traced (held by a debugger), frozen (by its control group), stuck (uninterruptible sleep),
    gone, unrecorded (no pid file). `port_owner`: ours, stranger, nobody, unknown. `frozen_by`: the file that says so.
    `start_failure`: why the last start failed, if there is no process. `restarting`: a person's start.sh ends it and starts it
    again, or has done so during the run.
    """

    state: str = "unrecorded"
    pid: int | None = None
    age_s: float | None = None
    port_owner: str = "unknown"
    holder: str = ""
    oom_killed: bool = False
    open_files: int | None = None
    open_files_limit: int | None = None
    frozen_by: str = ""
    start_failure: str = ""
    restarting: bool = False

    @property
    def out_of_files(self) -> bool:
        """Whether it can hardly open a file or accept a connection. 95 %, for some may just have been closed."""
        files, limit = self.open_files, self.open_files_limit
        return files is not None and limit is not None and files >= 0.95 * limit

    @property
    def alive(self) -> bool:
        return self.state in ("runs", "stopped", "traced", "frozen", "stuck")


@dataclass(frozen=True)
class Identity:
    """Which process answers, in its own words. `start_time`: clock ticks since the boot `boot_id`."""

    pid: int
    start_time: int
    boot_id: str
    version: str = ""


@dataclass(frozen=True)
class Outcomes:
    """How users' requests ended since the process started. `failed`: by reason, without refusals, mistakes and aborts."""

    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Corruption:
    """What the API noticed of its own wrong computing. The words are same, differs, pending and off; empty if unknown.

    `nonfinite_recent`: requests within ten minutes, and since the last cure, whose logits were not finite. `fingerprint`: the
    digests of a fixed request against those after the start; `reference`: the first load against the transformers modules.
    """

    nonfinite_total: int = 0
    nonfinite_recent: int = 0
    fingerprint: str = ""
    fingerprint_stage: str = ""
    fingerprint_age_s: float | None = None
    reference: str = ""
    reference_detail: str = ""


@dataclass(frozen=True)
class CardEvent:
    """A message of the driver that the API's process received. `kind`: xid or ecc."""

    kind: str
    code: int
    card: int = 0
    age_s: float = 0.0


@dataclass(frozen=True)
class SelfReport:
    """What the API says of itself, in /health and in the heartbeat file alike. An older API says none of it.

    `loading_still_s`: seconds since anything of the load moved. `failed_callers`: how many keys have met each reason of a
    failure lately. `pace`: engine time since the start, as
    {"decode": {rows: [steps, seconds]}, "prefill": [tokens, seconds], "vision": [patches, seconds]}.
    """

    identity: Identity | None = None
    loading_still_s: float | None = None
    outcomes: Outcomes | None = None
    failed_callers: dict[str, int] = field(default_factory=dict)
    pace: dict[str, Any] | None = None
    corrupt: Corruption | None = None
    card_events: tuple[CardEvent, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SelfReport:
        fields: dict[str, Any] = dict(raw)
        for name, kind in (("identity", Identity), ("outcomes", Outcomes), ("corrupt", Corruption)):
            fields[name] = kind(**fields[name]) if fields.get(name) else None
        fields["card_events"] = tuple(CardEvent(**event) for event in fields.get("card_events") or ())
        return cls(**fields)


@dataclass(frozen=True)
class Heartbeat:
    """The server's heartbeat file. `beat_age_s` is the event loop's, `written_age_s` that of the thread that writes the file."""

    beat_age_s: float
    written_age_s: float
    state: str = ""
    phase: str = ""
    steps: int | None = None
    pending: int = 0
    no_progress_s: float = 0.0
    deadline_s: float | None = None
    progress: float | None = None
    report: SelfReport = SelfReport()
    kv_peak_tokens: int | None = None  # most tokens in the KV cache within the last minute

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Heartbeat:
        return cls(**{**raw, "report": SelfReport.from_dict(raw.get("report") or {})})


@dataclass(frozen=True)
class HealthReply:
    """The reply to GET /health, or its equivalent from an external engine's metrics.

    `outcome`: answered, refused, silent, failed. `success_age_s`: seconds since a user was answered, by kind of request.
    `proven`: whether it knows the probe token; None if it gave no proof, or if there is no token to check one with.
    `unanswered_s`: for how long an engine behind has had questions and has not moved, whether their clients waited or left.
    """

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
    success_age_s: dict[str, float] = field(default_factory=dict)
    proven: bool | None = None
    report: SelfReport = SelfReport()
    unanswered_s: float | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> HealthReply:
        return cls(**{**raw, "report": SelfReport.from_dict(raw.get("report") or {})})

    @property
    def answered(self) -> bool:
        return self.outcome == "answered"


@dataclass(frozen=True)
class Answer:
    """The answer to a real question, or to several of one kind. `kind`: text or picture.

    `outcome`: right, wrong, unjudged (no baseline of this model), rejected (an HTTP error), cut (no end marker), silent,
    refused, failed, skipped, credited (not asked, because a user was answered recently). `tries`: each kind of question that
    was judged, such as color, and whether rightly answered; `questions`: how many were answered.
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
    tries: tuple[tuple[str, bool], ...] = ()
    questions: int = 0

    @property
    def good(self) -> bool:
        """Answered. Whether the share of wrong answers is too high is judged over many runs (`accuracy.py`)."""
        return self.outcome in ("right", "wrong", "unjudged", "credited")


@dataclass(frozen=True)
class Fall:
    """A kind of question whose share of right answers has fallen: now, and in the baseline."""

    kind: str
    asked: int
    right: int
    baseline_asked: int
    baseline_right: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else 0.0

    @property
    def baseline(self) -> float:
        return self.baseline_right / self.baseline_asked if self.baseline_asked else 0.0


@dataclass(frozen=True)
class AccuracyEvidence:
    """`sure`: the kinds that the model answers surely; `taken`: kinds with a baseline; `blind`: pictures are never answered
    rightly, and never were; `worse`: kinds that this revision answers less rightly than the one before."""

    falls: tuple[Fall, ...] = ()
    sure: tuple[str, ...] = ()
    taken: int = 0
    blind: bool = False
    pictures_right: int = 0
    pictures_asked: int = 0
    worse: tuple[Fall, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """Users' requests of the last runs, newest run included, until there are enough to judge.

    `failed_now`: failures since the run before; `runs_failing`: runs with new failures since the share was last within its
    limit. None in ApiEvidence if there is no earlier count of the same process.
    """

    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    span_s: float = 0.0
    failed_now: int = 0
    runs_failing: int = 0

    @property
    def failures(self) -> int:
        return sum(self.failed.values())

    @property
    def share(self) -> float:
        """Of requests that failed, 0 to 1; 0 without requests."""
        return self.failures / max(1, self.answered + self.failures)


@dataclass(frozen=True)
class EngineEvidence:
    """The engine behind the API. `reply`: of its own /health and counters; `process`: of what GLM_ENGINE_COMMAND started.

    `is_ours`: there is such a command, so that it can be started again.
    """

    url: str
    reply: HealthReply
    process: Process = Process()
    is_ours: bool = False


@dataclass(frozen=True)
class ApiEvidence:
    """`last` is a second reply of /health after a failed question, to see whether the engine made steps meanwhile.

    `blind`: why the checker could not observe anything; empty if it could. `other`: who says to answer, if it is not the
    process that was started here. `no_credit`: why answers to users could not
    replace questions, empty if they could. `unproven_runs`: runs in a row in which the very process that was started here
    did not know the probe token. `draining_s`: for how long this process has been seen draining; None if it is not.
    `model_key`: model, revision and recipe, if known. `engine`: the one behind it; None: it is the API's own.
    """

    url: str
    process: Process = Process()
    beat: Heartbeat | None = None
    first: HealthReply = HealthReply("silent")
    answers: tuple[Answer, ...] = ()
    last: HealthReply | None = None
    hardware: tuple[str, ...] = ()
    blind: str = ""
    other: str = ""
    no_credit: str = ""
    unproven_runs: int = 0
    draining_s: float | None = None
    traffic: Traffic | None = None
    model_key: dict[str, str] | None = None
    accuracy: AccuracyEvidence | None = None
    engine: EngineEvidence | None = None

    @property
    def report(self) -> SelfReport:
        """The newest that the API says of itself: over HTTP, or in its heartbeat file where HTTP is silent."""
        for reply in (self.last, self.first):
            if reply is not None and reply.answered:
                return reply.report
        fresh = self.beat is not None and self.beat.written_age_s <= BEAT_STALE_S
        return self.beat.report if self.beat is not None and fresh else SelfReport()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ApiEvidence:
        """The inverse of `to_dict`. Raises TypeError for an unknown field."""
        fields: dict[str, Any] = dict(raw)
        fields["process"] = Process(**fields.get("process") or {})
        fields["beat"] = Heartbeat.from_dict(fields["beat"]) if fields.get("beat") else None
        fields["first"] = HealthReply.from_dict(fields["first"])
        fields["last"] = HealthReply.from_dict(fields["last"]) if fields.get("last") else None
        fields["traffic"] = Traffic(**fields["traffic"]) if fields.get("traffic") else None
        fields["answers"] = tuple(_answer(answer) for answer in fields.get("answers") or ())
        fields["accuracy"] = _accuracy(fields["accuracy"]) if fields.get("accuracy") else None
        fields["hardware"] = tuple(fields.get("hardware") or ())
        if engine := fields.get("engine"):
            reply, process = HealthReply.from_dict(engine["reply"]), Process(**engine.get("process") or {})
            fields["engine"] = EngineEvidence(**{**engine, "reply": reply, "process": process})
        return cls(**fields)


def _answer(raw: Mapping[str, Any]) -> Answer:
    return Answer(**{**raw, "tries": tuple((kind, right) for kind, right in raw.get("tries") or ())})


def _accuracy(raw: Mapping[str, Any]) -> AccuracyEvidence:
    falls = tuple(Fall(**fall) for fall in raw.get("falls") or ())
    worse = tuple(Fall(**fall) for fall in raw.get("worse") or ())
    return AccuracyEvidence(**{**raw, "falls": falls, "worse": worse, "sure": tuple(raw.get("sure") or ())})


@dataclass(frozen=True)
class PageReply:
    """The reply to one HTTP request or WebSocket handshake with the page. `outcome` as in HealthReply."""

    outcome: str
    seconds: float = 0.0
    status: int = 0
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.outcome == "answered" and self.status in (101, 200)


@dataclass(frozen=True)
class ApiContact:
    """What the page says of its own calls to the API. `answer`: ok, refused, loading, unreachable.

    `status`: of its request, 0 without a response. `address`: host and port of the API that it asks.
    """

    answer: str
    status: int = 0
    address: str = ""


@dataclass(frozen=True)
class PageEvidence:
    """`script` runs the page's script and is requested on some runs only; `front` goes through the reverse proxy.

    `token`: the reply of a route that needs the token, asked only where the WebSocket was refused. `tokenless`: of the same
    route without the token, where one is set.
    `api_contact`: None if the page did not say, as an older one does not.
    """

    url: str
    process: Process = Process()
    health: PageReply = PageReply("silent")
    websocket: PageReply | None = None
    script: PageReply | None = None
    front: PageReply | None = None
    token: PageReply | None = None
    tokenless: PageReply | None = None
    api_contact: ApiContact | None = None
    blind: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FrontEvidence:
    """The nginx in front of several replicas. `reply`: of a route that nginx answers by itself, whatever the replicas do."""

    url: str
    process: Process = Process()
    reply: PageReply = PageReply("silent")
    blind: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Replica:
    """What the run of one replica found. `card`: empty without a choice of cards; `since`: when its state began (Unix seconds)."""

    number: int
    port: int
    card: str
    word: str
    rule: str
    en: str
    zh: str
    since: float | None = None
    incident: str | None = None
    restarts_last_day: int = 0
    circuit_open: str | None = None
    decision: str = "none"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Observation:
    """Everything that one run observed. `page` is None where no page is expected on this machine.

    `front` and `replicas` are of a service of several replicas, whose APIs were observed by runs of their own; `api` is empty then.

    `machine` and `gpu` are readings for the report and the thresholds. `asked`: at least one question was asked, not credited.
    `records`: what the pid files say, by part, for a run that finds one of them lost.
    """

    moment: Moment
    api: ApiEvidence
    page: PageEvidence | None
    machine: dict[str, Any]
    gpu: dict[str, Any]
    asked: bool = False
    records: dict[str, Any] = field(default_factory=dict)
    front: FrontEvidence | None = None
    replicas: tuple[Replica, ...] = ()


@dataclass
class EngineProgress:
    """Progress of an external engine, kept between runs.

    `counters`: its token counters at the last observation; `still_since` (CLOCK_MONOTONIC): when they last changed, or were
    last idle; `steps`: how often they have changed.
    """

    counters: dict[str, float] = field(default_factory=dict)
    still_since: float | None = None
    boot_id: str = ""
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], boot_id: str) -> EngineProgress:
        """The stored state; empty after a reboot, which resets the monotonic clock."""
        if not raw or raw.get("boot_id") != boot_id:
            return cls(boot_id=boot_id)
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})
