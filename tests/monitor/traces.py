"""Evidence for tests: single observations with a known truth, and random traces of them."""

from __future__ import annotations

import random
from dataclasses import replace

from monitor.judge import history, limiter
from monitor.judge.api_rules import judge_api
from monitor.judge.evidence import (
    Answer,
    ApiEvidence,
    HealthReply,
    Heartbeat,
    Moment,
    Process,
    SelfReport,
    Traffic,
)  # fmt: skip
from monitor.judge.history import History
from monitor.judge.limiter import Allowance, Decision, Limiter
from monitor.judge.verdict import Limits, Verdict

URL = "http://127.0.0.1:8080"
RUNS = Process("runs", 4711, 9000.0, "ours")
IDLE = HealthReply("answered", 0.01, 200, "idle", "idle", 70, 0, 0.0)
RIGHT = (Answer("text", "right", 0.4, 200), Answer("picture", "right", 0.8, 200, "red circle", "red"))
SILENT = (Answer("text", "silent", 10.0, detail="no answer within 10.0 s"), Answer("picture", "skipped"))
FULL = (Answer("text", "rejected", 0.1, 503, detail="The queue is full"), Answer("picture", "rejected", 0.1, 503))
NO_HTTP = HealthReply("silent", 2.0, detail="no answer within 2.0 s")


def beat(age_s: float = 0.4, written_age_s: float = 0.8, **changes) -> Heartbeat:
    heartbeat = Heartbeat(age_s, written_age_s, "idle", "idle", 70, 0, 0.0, 120.0, 1.0)
    return replace(heartbeat, **changes) if changes else heartbeat


def busy(no_progress_s: float = 3.0, steps: int = 70, deadline_s: float = 120.0, phase: str = "decode") -> HealthReply:
    return HealthReply("answered", 0.01, 200, "busy", phase, steps, 9, no_progress_s, deadline_s)


HEALTHY = {"url": URL, "process": RUNS, "beat": beat(), "first": IDLE, "answers": RIGHT}


def api(**changes) -> ApiEvidence:
    return ApiEvidence(**{**HEALTHY, **changes})


GONE = api(process=Process("gone", 4711, None, "nobody"), beat=None, first=HealthReply("refused"), answers=())
WEDGED = api(first=busy(400, phase="prefill"), answers=SILENT, last=busy(410, phase="prefill"))


def zombie(beat_age_s: float) -> ApiEvidence:
    return api(beat=beat(beat_age_s), first=NO_HTTP, answers=SILENT, last=NO_HTTP)


def alive(rng: random.Random) -> ApiEvidence:
    """An observation of a working service, which may be slow, busy, starting or hardly visible."""
    kind = rng.randrange(12)
    steps = rng.randrange(1000)
    waits = rng.choice([SILENT, FULL])
    if kind == 0:
        return api()
    if kind == 1:  # rejected, making steps
        return api(first=busy(1, steps), answers=waits, last=busy(1, steps + rng.randrange(1, 50)))
    if kind == 2:  # one long step within its deadline
        held = rng.uniform(0, 110)
        return api(first=busy(held, steps, phase="prefill"), answers=waits, last=busy(held + 9, steps, phase="prefill"))
    if kind == 3:  # too slow even for /health, still beating and working
        working = beat(rng.uniform(0, 5), pending=3, no_progress_s=rng.uniform(0, 100))
        return api(beat=working, first=NO_HTTP, answers=SILENT, last=NO_HTTP)
    if kind == 4:  # the loop was blocked, but for less than a minute
        return zombie(rng.uniform(0, 55))
    if kind == 5:
        share = rng.random()
        # An API that says whether its loading moves may take as long as it likes.
        still_s = rng.choice([None, rng.uniform(0, 299)])
        age_s = rng.uniform(0, 890) if still_s is None else rng.uniform(0, 90_000)
        reply = HealthReply("answered", 0.1, 503, "loading", "loading", 0, 0, progress=share, report=SelfReport(loading_still_s=still_s))
        return api(first=reply, answers=(), process=replace(RUNS, age_s=age_s))
    if kind == 6:  # just started
        return api(process=replace(RUNS, age_s=rng.uniform(0, 59), port_owner="nobody"), beat=None, first=HealthReply("refused"), answers=())
    if kind == 7:  # the checker cannot reach anything
        return api(blind="its own connection to this machine fails", first=NO_HTTP, answers=SILENT, last=NO_HTTP, beat=None)
    if kind == 8:  # no heartbeat file
        return api(beat=None)
    if kind == 9:  # the first /health failed, the second shows steps
        return api(first=NO_HTTP, answers=SILENT, last=busy(2, steps), beat=beat(2, pending=4))
    if kind == 10:  # shutting down
        return api(first=HealthReply("answered", 0.1, 503, "draining", "draining", steps, 2), answers=())
    # Some users fail, as few of many do in a working service, or by themselves.
    failed = rng.choice([{"engine": rng.randrange(3)}, {"engine": 40}, {"grammar": 90, "deadline": 300}])
    traffic = Traffic(rng.randrange(800, 9000), failed, 60.0, sum(failed.values()), rng.randrange(5))
    return api(answers=(Answer("text", "credited"), Answer("picture", "right", 1.0, 200)), traffic=traffic)


class Replay:
    """Consecutive runs of the checker with a simulated clock."""

    def __init__(self, limits: Limits | None = None, allowance: Allowance | None = None, mode: str = "restart") -> None:
        self.limits = limits or Limits()
        self.allowance = allowance or Allowance()
        self.mode = mode
        self.history, self.limiter = History(), Limiter()
        self.wall, self.monotonic = 1_800_000_000.0, 5000.0
        self.decisions: list[Decision] = []
        self.verdicts: list[Verdict] = []
        self.changes: list[history.Change] = []
        self.messages = 0

    @property
    def restarts(self) -> int:
        return sum(decision.kind == "restart" for decision in self.decisions)

    def run(self, seen: ApiEvidence, after_s: float = 60.0, jump_s: float = 0.0) -> Decision:
        self.wall += after_s + jump_s
        self.monotonic += after_s
        now = Moment(self.wall, self.monotonic, "boot")
        verdict = judge_api(seen, self.limits)
        if verdict.bad and history.why_inconclusive(self.history.moment, now, self.limits):
            verdict = Verdict("api", "unknown", "clock_jump", "", "")
        self.history, changes = history.advance(self.history, verdict, now, self.limits)
        decision = limiter.decide(verdict, self.history, self.limiter, self.allowance, self.wall, self.mode)
        if decision.opens:
            self.limiter = limiter.opened(self.limiter, self.wall, decision.reason)
        if decision.kind == "restart":
            self.limiter = limiter.restarted(self.limiter, self.wall)
            self.history = history.after_restart(self.history, now)
        self.messages += sum(change.kind in ("opened", "closed") for change in changes) + decision.opens
        self.decisions.append(decision)
        self.verdicts.append(verdict)
        self.changes += changes
        return decision
