"""From evidence to a verdict: pure functions, no clock, no I/O. Every verdict can be explained and replayed.

Rules are tried in order of trust; the first that holds decides. A verdict carries the rule, the numbers, the
threshold, one sentence in English and Chinese, and whether a restart could cure it. Busy is not dead: while
pending work makes steps, or is within the deadline of its phase, nothing said over HTTP speaks against the service.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from monitor.judge.evidence import Answer, ApiEvidence, PageEvidence, Process

WORDS = ("healthy", "busy", "starting", "degraded", "broken", "wedged", "zombie", "hardware", "dead", "unknown")
SERVING = ("healthy", "busy", "degraded")
CALM = (*SERVING, "starting", "unknown")  # words that open no incident by themselves
FRESH_PROCESS_S = 60.0  # imports alone take a while on a slow machine
BEAT_STALE_S = 5.0


@dataclass(frozen=True)
class Limits:
    """The thresholds of the rules, in seconds and runs; from the settings."""

    period_s: float = 60.0
    beat_s: float = 60.0
    stall_s: float = 120.0
    start_s: float = 900.0
    confirm_runs: int = 2
    stable_s: float = 600.0


@dataclass(frozen=True)
class Verdict:
    """`cure`: a restart of this target can help. `needed`: runs in a row before it is believed.

    `attempts`: restarts worth trying in one incident, None where only the limiter counts.
    """

    target: str
    word: str
    rule: str
    en: str
    zh: str
    facts: dict[str, Any] = field(default_factory=dict)
    threshold: str = ""
    cure: bool = False
    needed: int = 1
    attempts: int | None = None

    @property
    def serving(self) -> bool:
        return self.word in SERVING

    @property
    def bad(self) -> bool:
        return self.word not in CALM


def judge_api(seen: ApiEvidence, limits: Limits) -> Verdict:
    for rule in (
        _blind, _answers_right, _hardware, _port_taken, _process_gone, _held_by_debugger, _says_dead, _loading,
        _stalled, _draining, _key_refused, _silent, _nothing_listens, _no_room, _unanswered, _wrong,
    ):  # fmt: skip
        verdict = rule(seen, limits)
        if verdict is not None:
            return verdict
    return Verdict(
        "api", "unknown", "no_evidence", "What was seen fits no rule; nothing is done.", "看到的情况不符合任何规则，不采取行动。"
    )


def _blind(seen: ApiEvidence | PageEvidence, limits: Limits) -> Verdict | None:
    if not seen.blind:
        return None
    target = "api" if isinstance(seen, ApiEvidence) else "page"
    return Verdict(
        target, "unknown", "checker_blind", f"The checker cannot judge: {seen.blind}.", f"检查程序无法判断：{seen.blind}。",
        threshold="the checker's own test must pass",
    )  # fmt: skip


def _answers_right(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    asked = [answer for answer in seen.answers if answer.outcome != "skipped"]
    if not asked or not all(answer.good for answer in asked):
        return None
    slowest = max(answer.seconds for answer in asked)
    facts = {"seconds": slowest, **{answer.kind: answer.outcome for answer in asked}}
    if seen.hardware:
        what = "; ".join(seen.hardware)
        return Verdict(
            "api", "degraded", "hardware_warns", f"It answers, but the GPU reports: {what}.", f"仍能回答，但显卡报告：{what}。", facts
        )
    return Verdict(
        "api", "healthy", "answers_right", f"It answered real questions rightly in {slowest:.2f} s.",
        f"真实提问得到正确回答，用时 {slowest:.2f} 秒。", facts, "every question that was asked",
    )  # fmt: skip


def _hardware(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    faults = list(seen.hardware)
    if seen.process.state == "stuck":
        faults.append(f"process {seen.process.pid} is in uninterruptible sleep (a driver or disk does not answer)")
    if not faults:
        return None
    what = "; ".join(faults)
    return Verdict(
        "api", "hardware", "hardware_fault", f"The hardware has failed: {what}. Reset the GPU or replace the instance; "
        "a restart of the service cannot help.", f"硬件故障：{what}。请重置显卡或更换实例，重启服务无济于事。",
        {"faults": faults}, "any fatal GPU error or stuck process", needed=limits.confirm_runs,
    )  # fmt: skip


def _port_taken(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    if seen.process.port_owner != "stranger":
        return None
    return _taken("api", "API", seen.process)


def _taken(target: str, name: str, process: Process) -> Verdict:
    return Verdict(
        target, "dead", "port_taken", f"The port of the {name} is held by {process.holder or 'another process'}. End it, "
        "then run ./start.sh.", f"{name} 的端口被 {process.holder or '其他进程'} 占用。请结束它，再运行 ./start.sh。",
        {"holder": process.holder}, "the port's owner must be the process that start.sh started",
    )  # fmt: skip


def _process_gone(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    if seen.process.state != "gone":
        return None
    return _gone("api", "API", seen.process)


def _gone(target: str, name: str, process: Process) -> Verdict:
    oom_en = " The kernel killed it for memory." if process.oom_killed else ""
    oom_zh = "它因内存不足被内核终止。" if process.oom_killed else ""
    return Verdict(
        target, "dead", "process_gone", f"The {name} process (pid {process.pid}) is gone.{oom_en}",
        f"{name} 进程（pid {process.pid}）已不存在。{oom_zh}", {"pid": process.pid, "oom_killed": process.oom_killed},
        "the recorded process must run", cure=True,
    )  # fmt: skip


def _held_by_debugger(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    if seen.process.state != "traced":
        return None
    return Verdict(
        "api", "unknown", "held_by_debugger", f"A debugger holds process {seen.process.pid}; it is left alone.",
        f"进程 {seen.process.pid} 正被调试器控制，不作处理。", {"pid": seen.process.pid},
    )  # fmt: skip


def _says_dead(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    look = seen.last or seen.first
    if look.state != "dead":
        return None
    why = look.reason or "no reason given"
    return Verdict(
        "api", "dead", "engine_dead", f"The server answers, but its engine has ended: {why}",
        f"服务有响应，但推理引擎已停止：{why}", {"reason": why}, "the engine's own word", cure=True,
    )  # fmt: skip


def _loading(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    state = seen.first.state or (seen.beat.state if seen.beat and not seen.first.answered else "")
    if state != "loading":
        return None
    share = seen.first.progress if seen.first.progress is not None else (seen.beat.progress if seen.beat else None)
    done = f"{100 * share:.0f} %" if share is not None else "?"
    age_s = seen.process.age_s
    facts = {"progress": share, "age_s": age_s}
    threshold = f"{limits.start_s:.0f} s from the start of the process"
    if age_s is not None and age_s > limits.start_s:
        return Verdict(
            "api", "broken", "loading_too_long", f"The model has been loading for {age_s / 60:.0f} minutes ({done}), "
            f"longer than {limits.start_s / 60:.0f}.", f"模型已加载 {age_s / 60:.0f} 分钟（{done}），超过上限 "
            f"{limits.start_s / 60:.0f} 分钟。", facts, threshold, cure=True, needed=limits.confirm_runs, attempts=1,
        )  # fmt: skip
    return Verdict(
        "api", "starting", "loading", f"The model is loading ({done}).", f"模型正在加载（{done}）。", facts, threshold
    )


def _stalled(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    """Work is pending and no step was made past the deadline: by two looks, or by the heartbeat file."""
    stuck = _stuck_for(seen, limits)
    if stuck is None:
        return None
    for_s, deadline_s, phase, source = stuck
    if _moved(seen):
        return None
    return Verdict(
        "api", "wedged", "no_progress", f"The engine has work but has made no step for {for_s:.0f} s"
        f" (phase {phase or 'unknown'}, {deadline_s:.0f} s allowed).",
        f"引擎有任务，但已 {for_s:.0f} 秒没有任何进展（阶段 {phase or '未知'}，允许 {deadline_s:.0f} 秒）。",
        {"no_progress_s": for_s, "phase": phase, "source": source, "gpu": "see evidence"},
        f"{deadline_s:.0f} s without a step while work is pending", cure=True,
    )  # fmt: skip


def _stuck_for(seen: ApiEvidence, limits: Limits) -> tuple[float, float, str, str] | None:
    """(seconds without progress, allowed, phase, source), only where the latest stamps are past the deadline."""
    look = seen.last or seen.first
    if look.answered and look.pending and look.no_progress_s is not None:
        deadline_s = _allowed_s(look.deadline_s, limits)
        if look.no_progress_s > deadline_s:
            return look.no_progress_s, deadline_s, look.phase, "health"
        return None
    beat = seen.beat
    # A stale file proves nothing about the engine: whoever writes it may itself be stopped.
    if beat is not None and beat.written_age_s <= BEAT_STALE_S and beat.pending:
        deadline_s = _allowed_s(beat.deadline_s, limits)
        if beat.no_progress_s > deadline_s:
            return beat.no_progress_s, deadline_s, beat.phase, "heartbeat file"
    return None


def _allowed_s(phase_deadline_s: float | None, limits: Limits) -> float:
    """The engine's guess for its phase may lengthen the limit, never shorten it: a guess must not cost a restart."""
    return max(phase_deadline_s or 0.0, limits.stall_s)


def _draining(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    if seen.first.state != "draining":
        return None
    return Verdict(
        "api", "degraded", "draining", "The API is shutting down and takes no new questions.", "接口正在关闭，不再接受新问题。"
    )


def _key_refused(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    for answer in seen.answers:
        if answer.outcome == "rejected" and answer.status in (401, 403):
            return Verdict(
                "api", "broken", "key_refused", "The API refused the checker's key: GLM_API_KEY is not the one it was "
                f"started with (HTTP {answer.status}).", f"接口拒绝了检查程序的密钥：GLM_API_KEY 与启动时不同（HTTP {answer.status}）。",
                {"status": answer.status}, needed=limits.confirm_runs,
            )  # fmt: skip
    return None


def _silent(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    """Connections are taken by the kernel, and nobody answers."""
    look = seen.last or seen.first
    if look.answered or look.outcome == "refused" or seen.process.state == "gone":
        return None
    # One that has beaten has come up: its silence is no start any more.
    if seen.beat is None and _is_fresh(seen):
        return _coming_up(seen)
    beat_age_s = seen.beat.beat_age_s if seen.beat else None
    facts = {"beat_age_s": beat_age_s, "process": seen.process.state, "pid": seen.process.pid}
    if seen.process.state != "stopped" and beat_age_s is not None and beat_age_s <= BEAT_STALE_S:
        return _silent_but_beating(seen, limits, facts)
    age_en = "has no heartbeat" if beat_age_s is None else f"has not beaten for {beat_age_s:.0f} s"
    age_zh = "没有心跳" if beat_age_s is None else f"已 {beat_age_s:.0f} 秒没有跳动"
    frozen = seen.process.state == "stopped"
    long_enough = beat_age_s is None or beat_age_s >= limits.beat_s
    return Verdict(
        "api", "zombie", "frozen" if frozen else "loop_stands_still",
        f"The API accepts connections but answers nothing, and its event loop {age_en}"
        + (" (the process was stopped by a signal)." if frozen else "."),
        f"接口接受连接但毫无应答，事件循环{age_zh}" + ("（进程被信号暂停）。" if frozen else "。"), facts,
        f"no beat for {limits.beat_s:.0f} s, on {limits.confirm_runs} runs in a row",
        # The observer's own stamp decides; without one, only more runs can stand in for it.
        cure=long_enough, needed=limits.confirm_runs + (1 if beat_age_s is None else 0),
    )  # fmt: skip


def _silent_but_beating(seen: ApiEvidence, limits: Limits, facts: dict[str, Any]) -> Verdict:
    """A slow machine answers late too, so this is believed late, and never while the engine has work."""
    if seen.beat is not None and seen.beat.pending:
        return Verdict(
            "api", "busy", "slow_http", "The API is slow to answer over HTTP, but its event loop beats and its engine works.",
            "接口 HTTP 响应缓慢，但事件循环仍在跳动，引擎仍在工作。", facts, f"a beat within {BEAT_STALE_S:.0f} s",
        )  # fmt: skip
    return Verdict(
        "api", "zombie", "silent_but_beating", "The API does not answer over HTTP, although its event loop beats and its "
        "engine is idle; connections may be exhausted.", "事件循环仍在跳动、引擎空闲，但接口没有 HTTP 响应，可能是连接耗尽。", facts,
        f"on {limits.confirm_runs + 3} runs in a row", cure=True, needed=limits.confirm_runs + 3, attempts=1,
    )  # fmt: skip


def _is_fresh(seen: ApiEvidence) -> bool:
    return seen.process.age_s is not None and seen.process.age_s < FRESH_PROCESS_S


def _coming_up(seen: ApiEvidence) -> Verdict:
    age_s = seen.process.age_s or 0.0
    return Verdict(
        "api", "starting", "process_fresh", f"The process is {age_s:.0f} s old and opens its port soon.",
        f"进程刚启动 {age_s:.0f} 秒，端口即将打开。", {"age_s": age_s}, f"{FRESH_PROCESS_S:.0f} s",
    )  # fmt: skip


def _nothing_listens(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    if seen.first.outcome != "refused":
        return None
    if seen.process.state == "unrecorded":
        return Verdict(
            "api", "dead", "not_started", f"Nothing listens at {seen.url}, and no process was started here by start.sh.",
            f"{seen.url} 无人监听，本机也没有由 start.sh 启动的进程。", threshold="run ./start.sh",
        )  # fmt: skip
    if _is_fresh(seen):
        return _coming_up(seen)
    return Verdict(
        "api", "dead", "port_closed", f"Process {seen.process.pid} runs, but nothing listens at {seen.url}.",
        f"进程 {seen.process.pid} 在运行，但 {seen.url} 无人监听。", {"age_s": seen.process.age_s},
        f"{FRESH_PROCESS_S:.0f} s after its start",
        cure=True, needed=limits.confirm_runs,
    )  # fmt: skip


def _no_room(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    """Turned away or not answered in time, by an engine that moves or is within its deadline: busy, not dead."""
    waiting = [answer for answer in seen.answers if _found_no_room(answer)]
    failed = [answer for answer in seen.answers if not answer.good and answer.outcome != "skipped" and answer not in waiting]
    if not waiting or failed:
        return None
    look = seen.last or seen.first
    steps_en = steps_zh = ""
    if _moved(seen) and seen.first.steps is not None and look.steps is not None:
        steps_en = f", while the engine made {look.steps - seen.first.steps} steps"
        steps_zh = f"，期间引擎前进了 {look.steps - seen.first.steps} 步"
    elif not look.pending:
        return None
    elif not _moved(seen):
        allowed_s = _allowed_s(look.deadline_s, limits)
        steps_en = f", and one step is under way for {look.no_progress_s or 0:.0f} s of {allowed_s:.0f} allowed"
        steps_zh = f"，当前一步已进行 {look.no_progress_s or 0:.0f} 秒（允许 {allowed_s:.0f} 秒）"
    slowest = waiting[0]
    return Verdict(
        "api", "busy", "busy", f"It is busy: a question got no answer within {slowest.seconds:.0f} s{steps_en}.",
        f"服务繁忙：{slowest.seconds:.0f} 秒内没有轮到提问{steps_zh}。",
        {"pending": look.pending, "no_progress_s": look.no_progress_s, "phase": look.phase},
        "steps are made, or the phase is within its deadline",
    )  # fmt: skip


def _unanswered(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    """The engine is idle and yet a question is lost."""
    lost = [answer for answer in seen.answers if _found_no_room(answer)]
    if not lost:
        return None
    what = lost[0].detail or "no answer"
    return Verdict(
        "api", "broken", "lost_question", f"The engine says it is idle, but a {lost[0].kind} question got no answer: {what}.",
        f"引擎显示空闲，但{_kind_zh(lost[0])}提问没有回答：{what}。", {"seconds": lost[0].seconds},
        f"on {limits.confirm_runs} runs in a row", cure=True, needed=limits.confirm_runs, attempts=2,
    )  # fmt: skip


def _wrong(seen: ApiEvidence, limits: Limits) -> Verdict | None:
    failed = [answer for answer in seen.answers if not answer.good and answer.outcome != "skipped"]
    if not failed:
        return None
    first = failed[0]
    good = [answer.kind for answer in seen.answers if answer.good]
    besides_en = f" ({good[0]} questions still work)" if good else ""
    besides_zh = f"（{'文字' if good[0] == 'text' else '图片'}提问仍正常）" if good else ""
    if first.outcome == "wrong":
        en = f"The {first.kind} question was answered wrongly: expected {first.expected}, got {first.text!r}{besides_en}."
        zh = f"{_kind_zh(first)}提问的回答有误：应为 {first.expected}，实为 {first.text!r}{besides_zh}。"
    else:
        what = first.detail or f"HTTP {first.status}"
        en = f"The {first.kind} question failed: {what}{besides_en}."
        zh = f"{_kind_zh(first)}提问失败：{what}{besides_zh}。"
    # A request that the server calls a mistake is refused by the next process too.
    curable = not (first.outcome == "rejected" and 400 <= first.status < 500)
    return Verdict(
        "api", "broken", f"{first.kind}_{first.outcome}", en, zh,
        {"status": first.status, "expected": first.expected, "answer": first.text},
        f"on {limits.confirm_runs} runs in a row", cure=curable, needed=limits.confirm_runs, attempts=2,
    )  # fmt: skip


def _found_no_room(answer: Answer) -> bool:
    return answer.outcome == "silent" or (answer.outcome == "rejected" and answer.status in (429, 503))


def _moved(seen: ApiEvidence) -> bool:
    if seen.last is None or seen.last.steps is None or seen.first.steps is None:
        return False
    return seen.last.steps > seen.first.steps


def _kind_zh(answer: Answer) -> str:
    return "文字" if answer.kind == "text" else "图片"
