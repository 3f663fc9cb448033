"""The rules for the nginx in front of several replicas: pure functions from evidence to a verdict.

What the replicas do is none of its: it is well if it answers by itself.
"""

from __future__ import annotations

from monitor.judge.evidence import FrontEvidence
from monitor.judge.verdict import (
    FRESH_PROCESS_S,
    Limits,
    Verdict,
    checker_blind,
    frozen_by_group,
    port_taken,
    process_gone,
    restarting,
)


def judge_front(evidence: FrontEvidence, limits: Limits) -> Verdict:
    blind = checker_blind(evidence, limits)
    if blind is not None:
        return blind
    process, reply = evidence.process, evidence.reply
    if process.restarting:
        return restarting("front", "nginx", process)
    if process.port_owner == "stranger" and process.state != "gone":
        return port_taken("front", "nginx", process)
    if process.state == "gone":
        return process_gone("front", "nginx", process)
    if process.state == "frozen":
        return frozen_by_group("front", "nginx", process, limits)
    if reply.good:
        return Verdict(
            "front", "healthy", "front_answers", f"nginx answered in {reply.seconds:.2f} s.", f"nginx {reply.seconds:.2f} 秒内响应。",
            {"seconds": reply.seconds},
        )  # fmt: skip
    if process.state == "unrecorded":
        why = process.start_failure
        return Verdict(
            "front", "dead", "not_started",
            f"Nothing answers at {evidence.url}, and no nginx was started here by start.sh." + (f" The last start failed: {why}" if why else ""),
            f"{evidence.url} 没有应答，本机也没有由 start.sh 启动的 nginx。" + (f"上次启动失败：{why}" if why else ""),
            {"start_failure": why} if why else {}, "run ./start.sh",
        )  # fmt: skip
    if process.age_s is not None and process.age_s < FRESH_PROCESS_S / 6:
        return Verdict(
            "front", "starting", "process_fresh", f"The nginx process is {process.age_s:.0f} s old.",
            f"nginx 进程刚启动 {process.age_s:.0f} 秒。", {"age_s": process.age_s}, f"{FRESH_PROCESS_S / 6:.0f} s",
        )  # fmt: skip
    word = {"refused": "dead", "silent": "zombie"}.get(reply.outcome, "broken")
    why = reply.detail or f"HTTP {reply.status}"
    return Verdict(
        "front", word, f"front_{reply.outcome}", f"nginx does not answer, whatever the replicas do: {why}.",
        f"nginx 没有响应（与各副本无关）：{why}。", {"process": process.state, "status": reply.status},
        f"on {limits.confirm_runs} runs in a row", cure=process.alive, needed=limits.confirm_runs,
    )  # fmt: skip
