"""The rules for an engine behind the API (GLM_ENGINE_URL): which of the API's faults are the engine's, and what they are called.

The API in front is judged first, by the rules of `api_rules`. What is wrong with its own process stays as it is. Where it
answers and cannot serve, the evidence of the engine itself says why: its process, its own /health, its token counters. A
restart is then one of the engine, and none of the API in front of it.
"""

from __future__ import annotations

from dataclasses import replace

from monitor.judge.evidence import ApiEvidence, EngineEvidence
from monitor.judge.verdict import Limits, Verdict

PART = "engine"  # its name on start.sh's command line
# Verdicts on an API in front that come from what the engine does or does not do.
OF_THE_ENGINE = (
    "loading", "loading_stands_still", "loading_too_long", "no_progress", "lost_question", "busy", "users_fail", "no_evidence",
)  # fmt: skip
OF_ITS_ANSWERS = ("text_", "picture_", "accuracy_")
OPENS_LATE_S = 900.0  # vLLM opens its port only once the model is loaded
KEY_REFUSED = "refuses GLM_ENGINE_KEY"
NOT_YET = ("HTTP 503", "takes no connections", "has not been asked yet", "has not answered")  # in the words of the front


def judge_behind(verdict: Verdict, evidence: ApiEvidence, limits: Limits) -> Verdict:
    """The verdict on the API, or what the engine behind it explains of that."""
    engine = evidence.engine
    if engine is None or not evidence.first.answered:
        return verdict
    answers = verdict.rule.startswith(OF_ITS_ANSWERS)
    if not answers and verdict.rule not in OF_THE_ENGINE:
        # The engine's own evidence may come first: nobody asks, and it is gone.
        return (_gone(engine, limits) or verdict) if verdict.word == "healthy" else verdict
    # While tokens flow, a late answer of /health is no sign of a hang.
    for rule in (_gone, _dead, _stands_still, *(() if verdict.rule == "busy" else (_silent,))):
        found = rule(engine, limits)
        if found is not None:
            return found
    if verdict.rule in ("no_progress", "lost_question") or (verdict.rule == "busy" and _starves(evidence, engine, limits)):
        return _hangs(
            engine, f"its own /health says HTTP {engine.reply.status}, and a question gets no answer ({verdict.en.rstrip('.')})",
            f"其 /health 返回 HTTP {engine.reply.status}，但提问得不到回答", limits,
        )  # fmt: skip
    if verdict.rule.startswith("loading"):
        return _not_ready(engine, evidence, limits)
    if answers:
        return replace(
            verdict, part=PART, en=f"The engine behind: {verdict.en}", zh=f"后端引擎：{verdict.zh}", facts={**verdict.facts, "engine": engine.url}
        )
    return verdict


def _starves(evidence: ApiEvidence, engine: EngineEvidence, limits: Limits) -> bool:
    """Whether an engine that seems busy does nothing: it was asked, did not move, and counts no request of its own.

    The process that writes its metrics may be another one than the one that hangs, and count nothing then.
    """
    first, last = evidence.first, evidence.last or evidence.first
    if last.steps is None or last.steps != first.steps:
        return False
    return engine.reply.pending == 0 or (last.unanswered_s or 0.0) > limits.stall_s


def _gone(engine: EngineEvidence, limits: Limits) -> Verdict | None:
    if engine.process.state == "gone":
        killed_en, killed_zh = (" The kernel killed it for memory.", "它因内存不足被内核终止。") if engine.process.oom_killed else ("", "")
        return Verdict(
            "api", "dead", "engine_gone", f"The process of the engine behind (pid {engine.process.pid}) is gone.{killed_en}",
            f"后端引擎进程（pid {engine.process.pid}）已不存在。{killed_zh}", _facts(engine), "the recorded process must run", cure=True, part=PART,
        )  # fmt: skip
    if engine.reply.outcome != "refused":
        return None
    age_s = engine.process.age_s
    if engine.process.alive and age_s is not None and age_s < OPENS_LATE_S:
        return Verdict(
            "api", "starting", "engine_starting", f"The engine behind has been starting for {age_s:.0f} s and has not opened its port.",
            f"后端引擎已启动 {age_s:.0f} 秒，端口尚未打开。", _facts(engine), f"{OPENS_LATE_S:.0f} s",
        )  # fmt: skip
    return Verdict(
        "api", "dead", "engine_unreachable", f"Nothing listens at {engine.url}, where the engine behind should answer.",
        f"{engine.url} 无人监听，后端引擎应在此应答。", _facts(engine), f"on {limits.confirm_runs} runs in a row", cure=True,
        needed=limits.confirm_runs, part=PART,
    )  # fmt: skip


def _dead(engine: EngineEvidence, limits: Limits) -> Verdict | None:
    if engine.reply.state != "dead":
        return None
    return Verdict(
        "api", "dead", "engine_behind_dead", f"The engine behind says itself that it cannot go on (HTTP {engine.reply.status} of /health).",
        f"后端引擎自称已无法继续服务（/health 返回 HTTP {engine.reply.status}）。", _facts(engine), "a /health of 200", cure=True,
        needed=limits.confirm_runs, part=PART,
    )  # fmt: skip


def _silent(engine: EngineEvidence, limits: Limits) -> Verdict | None:
    if engine.reply.outcome not in ("silent", "failed"):
        return None
    what = engine.reply.detail or engine.reply.outcome
    return _hangs(engine, f"it accepts connections and does not answer GET /health ({what})", f"接受连接，但不应答 GET /health（{what}）", limits)


def _stands_still(engine: EngineEvidence, limits: Limits) -> Verdict | None:
    reply = engine.reply
    if reply.state == "stalled":
        return _hangs(engine, "it says itself that it makes no progress", "自称没有任何进展", limits)
    if not reply.pending or reply.no_progress_s is None or reply.no_progress_s <= limits.stall_s:
        return None
    return _hangs(
        engine, f"its /health says HTTP {reply.status}, {reply.pending} requests wait, and no token counter has moved for {reply.no_progress_s:.0f} s",
        f"/health 返回 HTTP {reply.status}，{reply.pending} 个请求在等待，但令牌计数已 {reply.no_progress_s:.0f} 秒没有变化", limits,
    )  # fmt: skip


def _hangs(engine: EngineEvidence, en: str, zh: str, limits: Limits) -> Verdict:
    return Verdict(
        "api", "wedged", "engine_stalled", f"The engine behind at {engine.url} hangs: {en}.", f"后端引擎 {engine.url} 已挂起：{zh}。", _facts(engine),
        f"on {limits.confirm_runs} runs in a row", cure=True, needed=limits.confirm_runs, part=PART,
    )  # fmt: skip


def _not_ready(engine: EngineEvidence, evidence: ApiEvidence, limits: Limits) -> Verdict:
    """It answers, but not with a model; the API in front says why."""
    reason = evidence.first.reason or engine.reply.reason or "no reason given"
    # It may have become ready since the front has looked: both look at their own times.
    soon = engine.reply.status == 503 or engine.reply.state == "loading" or any(sign in reason for sign in NOT_YET)
    if soon:
        age_s = engine.process.age_s
        late = age_s is not None and age_s > max(OPENS_LATE_S, limits.start_s)
        return Verdict(
            "api", "broken" if late else "starting", "engine_loading", f"The engine behind is not ready yet: {reason}.", f"后端引擎尚未就绪：{reason}。",
            _facts(engine), f"{OPENS_LATE_S:.0f} s from the start of its process, where it was started here", cure=late, needed=limits.confirm_runs, part=PART,
        )  # fmt: skip
    if KEY_REFUSED in reason:
        return Verdict(
            "api", "broken", "engine_key_refused", "The engine behind refuses GLM_ENGINE_KEY.", "后端引擎拒绝了 GLM_ENGINE_KEY。", _facts(engine),
            needed=limits.confirm_runs, part=PART,
        )  # fmt: skip
    return Verdict(
        "api", "broken", "engine_not_ready", f"The engine behind answers, but cannot be used: {reason}.", f"后端引擎有应答，但无法使用：{reason}。",
        _facts(engine), f"on {limits.confirm_runs} runs in a row", needed=limits.confirm_runs, part=PART,
    )  # fmt: skip


def _facts(engine: EngineEvidence) -> dict[str, object]:
    reply = engine.reply
    return {
        "engine": engine.url, "engine_health": reply.status or reply.outcome, "engine_pending": reply.pending,
        "engine_no_progress_s": reply.no_progress_s, "engine_pid": engine.process.pid,
    }  # fmt: skip
