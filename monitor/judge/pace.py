"""Whether the API has become slow against its own past: pure functions on plain state.

A busy server answers late and is not slow, so what is compared is the time of one unit of work at like load: a decode step at
so many rows, a prompt token in chunks of such a length, by the engine's own counters; or the checker's own questions at so
much pending work where a server has no such counters. The past belongs to a model, its recipe and a machine.

The limits, and what they come from:
- `FACTOR` 3: other work on a shared machine costs a factor of 2 to 3 now and then, what is worth waking somebody for costs more.
  Where the past itself scatters more, the limit is twice its 95th percentile over its median, at most `MOST`.
- `RUNS` 3: a spike of a minute touches two runs at most, because a run measures the time since the one before.
- `NEEDED` 20 runs before anything is judged. While fewer than `KEPT` are known each run is learned, later one in
  `LEARN_EVERY_S`: a creeping change over less than five days is still measured against what was before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from monitor.judge.evidence import Answer, Observation
from monitor.judge.slowness_cause import causes_of
from monitor.judge.verdict import Verdict

FACTOR, MOST = 3.0, 10.0
RUNS, RUNS_FAST = 3, 2
NEEDED, KEPT, RATIOS_KEPT = 20, 64, 300
LEARN_EVERY_S = 2 * 3600.0
STREAK_GAP_S = 900.0
PASTS_KEPT = 4
JUDGED = ("healthy", "busy")  # nothing is learned from a run with another verdict, which also says more than a slow pace
LEAST_UNITS = {"token": 8, "prompt": 16, "question": 1}
# A prompt token costs more behind a long context, so prompts alone must have become twice as slow as tokens to count.
PROMPT_SHARE = 0.5
UNITS = {"token": ("ms a token", "毫秒每词元"), "prompt": ("ms a prompt token", "毫秒每提示词元"), "question": ("ms for a question", "毫秒每次提问")}


@dataclass(frozen=True)
class Work:
    """`units` of one kind of work that took `seconds`. `group`: token, prompt or question; `name`: the group and the load."""

    group: str
    name: str
    units: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The work of one group of one run against its past: milliseconds a unit, now and usually."""

    group: str
    ratio: float
    now_ms: float
    usual_ms: float
    samples: int


@dataclass
class Past:
    """Seconds a unit of past runs by the name of the work, oldest first; `ratios`: of past runs to the medians at their time."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    learned_at: dict[str, float] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    lanes: dict[str, int] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """How many times slower than its median it must be to count as slow."""
        if len(self.ratios) < NEEDED:
            return FACTOR
        twentieths = statistics.quantiles(self.ratios, n=20)
        return min(MOST, max(FACTOR, 2 * twentieths[18] / max(0.1, statistics.median(self.ratios))))


@dataclass
class Pace:
    """What is kept between runs. `since`: when the slowness began that is in force (wall clock), None if it is not slow."""

    key: str = ""
    process: str = ""
    counters: dict[str, Any] = field(default_factory=dict)
    pasts: dict[str, Past] = field(default_factory=dict)
    slow_runs: int = 0
    fast_runs: int = 0
    first_slow_at: float = 0.0
    judged_at: float = 0.0
    waiting: list[float] = field(default_factory=list)
    since: float | None = None
    ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Pace:
        """The stored state. Unknown fields are dropped, missing ones get their default."""
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        pasts = {
            key: Past(**{name: past[name] for name in Past.__dataclass_fields__ if name in past})
            for key, past in (known.get("pasts") or {}).items()
        }
        return cls(**{**known, "pasts": pasts})


def judge(pace: Pace, observation: Observation, verdict: Verdict, recipe: str) -> Verdict:
    """Compares the work since the last run with the past, learns from it, and returns the verdict or a worse one.

    `recipe`: model, revision and data types as the server states them; empty if unknown in this run. Updates `pace`.
    """
    if recipe:
        _watch(pace, f"{recipe} on {observation.machine.get('name') or 'this machine'}")
    past = _past_of(pace)
    work = _work_since(pace, observation)
    if verdict.word not in JUDGED:
        return verdict
    if not work:
        return verdict if pace.since is None else _still_slow(pace, past, verdict)
    now = observation.moment.wall
    if pace.since is None and not 0 <= now - pace.judged_at < STREAK_GAP_S:
        pace.slow_runs = 0
    compared = compare(past, work)
    if compared is not None:
        pace.ratio = round(compared.ratio, 2)
    if compared is None:
        if pace.since is not None:  # a load without a past says nothing, and a slow time is never learned
            return _still_slow(pace, past, verdict)
        pace.ratio = None
        _learn(past, work, now)
        return verdict
    pace.judged_at = now
    _count(pace, past, compared, work, now)
    if pace.since is None:
        if not pace.slow_runs:
            _remember_lanes(past, observation)
        return verdict
    if pace.fast_runs:
        return _worse(past, verdict, f"It was slower than before, and no longer in this run ({pace.ratio:.1f} times); one more such run ends this.",
                      f"此前比以往慢，本次检查中已不再慢（{pace.ratio:.1f} 倍）；下次检查仍如此则解除。", {"times": pace.ratio})  # fmt: skip
    return _slower(compared, pace, past, observation, verdict)


def forget(pace: Pace) -> bool:
    """Takes the pace of today as the new normal, if it is judged slow. For an operator. False if it is not."""
    if pace.since is None:
        return False
    pace.pasts.pop(pace.key, None)
    pace.since, pace.slow_runs, pace.waiting, pace.ratio = None, 0, [], None
    return True


def compare(past: Past, work: list[Work]) -> Comparison | None:
    """The slowest group against its past; None without enough past."""
    found = []
    for group in ("token", "prompt", "question"):
        known = [piece for piece in work if piece.group == group and len(past.seconds.get(piece.name, ())) >= NEEDED]
        usual_s = sum(piece.units * statistics.median(past.seconds[piece.name]) for piece in known)
        if usual_s > 0:
            units, seconds = sum(piece.units for piece in known), sum(piece.seconds for piece in known)
            weight = PROMPT_SHARE if group == "prompt" and any(piece.group == "token" for piece in work) else 1.0
            samples = min(len(past.seconds[piece.name]) for piece in known)
            found.append(Comparison(group, weight * seconds / usual_s, 1000 * seconds / units, 1000 * usual_s / units, samples))
    return max(found, key=lambda comparison: comparison.ratio, default=None)


def _past_of(pace: Pace) -> Past:
    past = pace.pasts.pop(pace.key, None) or Past()
    pace.pasts[pace.key] = past  # the one in use comes last
    while len(pace.pasts) > PASTS_KEPT:
        del pace.pasts[next(iter(pace.pasts))]
    return past


def _watch(pace: Pace, key: str) -> None:
    """A slowness that was found is one of the earlier model, recipe or machine, and says nothing of another."""
    if key != pace.key:
        pace.since, pace.slow_runs, pace.fast_runs, pace.waiting, pace.ratio = None, 0, 0, [], None
    pace.key = key


def _count(pace: Pace, past: Past, compared: Comparison, work: list[Work], now: float) -> None:
    """Counts slow runs in a row. A spike that ends is learned as the scatter of this machine, a lasting change never."""
    if compared.ratio >= past.limit:
        pace.first_slow_at = pace.first_slow_at if pace.slow_runs else now
        pace.slow_runs, pace.fast_runs = pace.slow_runs + 1, 0
        pace.waiting.append(round(compared.ratio, 3))
        if pace.slow_runs >= RUNS and pace.since is None:
            pace.since = pace.first_slow_at
        pace.waiting = pace.waiting[-RUNS:]
        return
    if pace.since is not None:
        pace.fast_runs = pace.fast_runs + 1 if compared.ratio < past.limit / 1.5 else 0
        if pace.fast_runs < RUNS_FAST:
            return
        pace.since, pace.waiting = None, []
    past.ratios = [*past.ratios, *pace.waiting, round(compared.ratio, 3)][-RATIOS_KEPT:]
    pace.slow_runs, pace.waiting = 0, []
    _learn(past, work, now)


def _learn(past: Past, work: list[Work], now: float) -> None:
    for piece in work:
        kept = past.seconds.setdefault(piece.name, [])
        # abs: a clock that was set back must not stop the learning
        if len(kept) >= KEPT and abs(now - past.learned_at.get(piece.name, 0.0)) < LEARN_EVERY_S:
            continue
        past.seconds[piece.name] = [*kept, float(f"{piece.seconds / piece.units:.4g}")][-KEPT:]
        past.learned_at[piece.name] = now


# What was done since the last run.


def _work_since(pace: Pace, observation: Observation) -> list[Work]:
    api = observation.api
    report, reply = api.report, api.last or api.first
    if report.pace is None:
        pace.process, pace.counters = _process_of(observation), {}
        return _of_questions(api.answers, reply.pending)
    steps = reply.steps if reply.answered else (api.beat.steps if api.beat else None)
    process = _process_of(observation)
    before, now = (pace.counters if pace.process == process else {}), {**report.pace, "steps": steps}
    pace.process, pace.counters = process, now
    return _of_counters(before, now) if before else []


def _process_of(observation: Observation) -> str:
    who = observation.api.report.identity
    return f"{who.boot_id} {who.pid} {who.start_time}" if who else f"pid {observation.api.process.pid}"


def _of_counters(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Work]:
    work = []
    decode_steps = 0.0
    for rows in now.get("decode") or {}:
        steps, seconds = _difference((before.get("decode") or {}).get(rows), now["decode"][rows])
        decode_steps += steps
        work.append(Work("token", f"decode, {rows} rows", steps, seconds))
    tokens, seconds = _difference(before.get("prefill"), now.get("prefill"))
    if tokens > 0:
        # Short chunks cost more a token than long ones, so they are compared with each other only.
        all_steps = (now.get("steps") or 0) - (before.get("steps") or 0)
        work.append(Work("prompt", f"prefill, {_chunk(tokens / max(1.0, all_steps - decode_steps))}", tokens, seconds))
    return [piece for piece in work if piece.units >= LEAST_UNITS[piece.group] and piece.seconds > 0]


def _difference(before: Any, now: Any) -> tuple[float, float]:
    """(units, seconds) since `before`; nothing if a counter went backwards, as in a new process."""
    try:
        units, seconds = now[0] - (before[0] if before else 0), now[1] - (before[1] if before else 0)
    except (TypeError, IndexError, KeyError):
        return 0.0, 0.0
    return (float(units), float(seconds)) if units >= 0 and seconds >= 0 else (0.0, 0.0)


def _chunk(tokens: float) -> str:
    for most in (16, 64, 256):
        if tokens < most:
            return f"chunks below {most} tokens"
    return "long chunks"


def _of_questions(answers: tuple[Answer, ...], pending: int | None) -> list[Work]:
    """The checker's questions, by what was pending meanwhile: a question that waits for a slot is no slow engine."""
    load = next((name for most, name in ((1, "idle"), (4, "up to 4"), (16, "up to 16")) if (pending or 0) <= most), "more")
    return [
        Work("question", f"{answer.kind} question, {load} pending", 1, answer.seconds)
        for answer in answers
        if answer.outcome in ("right", "wrong") and answer.seconds > 0
    ]


# The verdict.


def _slower(compared: Comparison, pace: Pace, past: Past, observation: Observation, verdict: Verdict) -> Verdict:
    causes = causes_of(observation, past.lanes)
    cause_en = "; ".join(en for en, _ in causes) or "none seen in the processor, the memory and the card"
    cause_zh = "；".join(zh for _, zh in causes) or "处理器、内存和显卡均未见异常"
    unit_en, unit_zh = UNITS[compared.group]
    times = compared.now_ms / compared.usual_ms
    runs = max(pace.slow_runs, RUNS)
    minutes = max(1.0, (observation.moment.wall - (pace.since or observation.moment.wall)) / 60)
    return _worse(
        past, verdict,
        f"It is {times:.1f} times slower than before: {compared.now_ms:.3g} {unit_en} where this model took {compared.usual_ms:.3g} on this machine "
        f"at like load, for {minutes:.0f} min. Cause: {cause_en}.",
        f"比以往慢 {times:.1f} 倍：{compared.now_ms:.3g} {unit_zh}，而此模型在本机同等负载下通常为 {compared.usual_ms:.3g}，"
        f"已持续 {minutes:.0f} 分钟。原因：{cause_zh}。",
        {
            "times": round(times, 2), "ms": round(compared.now_ms, 3), "usual_ms": round(compared.usual_ms, 3), "unit": unit_en,
            "samples": compared.samples, "runs": runs, "cause": cause_en,
        },
    )  # fmt: skip


def _still_slow(pace: Pace, past: Past, verdict: Verdict) -> Verdict:
    """Nothing could be compared in this run, so what was found before stays in force."""
    ratio = pace.ratio or past.limit
    return _worse(past, verdict, f"It was {ratio:.1f} times slower than before when it last had work to compare.",
                  f"最近一次可比较时，比以往慢 {ratio:.1f} 倍。", {"times": ratio})  # fmt: skip


def _worse(past: Past, verdict: Verdict, en: str, zh: str, facts: dict[str, Any]) -> Verdict:
    threshold = f"{past.limit:.1f} times the median of its past, on {RUNS} runs in a row"
    return Verdict("api", "degraded", "slower_than_before", en, zh, {**facts, "otherwise": verdict.word}, threshold)


def _remember_lanes(past: Past, observation: Observation) -> None:
    """Remembers the PCIe width of healthy runs, against which a lost one is seen."""
    for card in observation.gpu.get("gpus") or ():
        if card.get("pcie_width"):
            name = str(card.get("uuid") or card.get("index"))
            past.lanes[name] = max(past.lanes.get(name, 0), int(card["pcie_width"]))
