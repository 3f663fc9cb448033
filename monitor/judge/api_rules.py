"""The rules for the API: pure functions from evidence to a verdict.

The kernel is heard first: of a process that is gone, stopped or in a debugger, or whose port another one holds, no answer
counts. Then what the API says of itself, then whether it answers.
"""

from __future__ import annotations

from typing import Any

from monitor.judge.accuracy import judge_accuracy
from monitor.judge.evidence import BEAT_STALE_S, Answer, ApiEvidence, CardEvent, HealthReply
from monitor.judge.traffic import NOT_CURABLE, curable_failures, is_failing
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

# XIDs for which NVIDIA's catalogue recommends a GPU reset, a reboot or diagnostics. Others, such as 13, 31, 43, 45, 68 and
# 109, are errors of an application: the card is well.
HARDWARE_XIDS = frozenset({46, 48, 62, 64, 74, 79, 95, 119, 120, 140, 143})
DOUBLE_BIT_ECC = 2  # NVML's number of the event
CARD_EVENT_S = 900.0
NONFINITE_LIMIT = 2
DRAIN_MARGIN_S = 60.0
LARGE_SHARE = 0.25
UNREACHED = ("gaierror", "OSError: [Errno 101]", "OSError: [Errno 113]")  # no such name, no route to the network or host
LOADING_BY_AGE_S = 900.0  # for an API that does not say whether its loading moves


def judge_api(evidence: ApiEvidence, limits: Limits) -> Verdict:
    for rule in (
        checker_blind, _hardware, _restarting, _port_taken, _process_gone, _held_by_debugger, _frozen_by_group, _frozen, _other_process, _engine_dead, _corrupt,
        judge_accuracy, _answers_right, _loading, _stalled, _draining, _key_refused, _out_of_reach, _silent, _nothing_listens, _busy, _unanswered, _failed,
    ):  # fmt: skip
        verdict = rule(evidence, limits)
        if verdict is not None:
            return _flawed(evidence, limits) or verdict if verdict.word in ("healthy", "busy") else verdict
    return Verdict(
        "api", "unknown", "no_evidence", "What was observed fits no rule; nothing is done.", "看到的情况不符合任何规则，不采取行动。"
    )


def _in_other_hands(evidence: ApiEvidence) -> bool:
    """Whatever answers, it is not the process that was started here, or that one cannot have answered."""
    process = evidence.process
    return process.port_owner == "stranger" or process.state in ("gone", "stopped", "traced", "frozen") or bool(evidence.other)


def _serves(evidence: ApiEvidence) -> bool:
    """Every question that was asked was answered correctly, by the process that was started here as far as is known."""
    asked = [answer for answer in evidence.answers if answer.outcome != "skipped"]
    return bool(asked) and all(answer.good for answer in asked) and not _in_other_hands(evidence)


def _hardware_faults(evidence: ApiEvidence) -> list[str]:
    faults = list(evidence.hardware)
    known = " ".join(f"{fault} " for fault in faults)
    for event in evidence.report.card_events if not _in_other_hands(evidence) else ():
        name = f"GPU {event.card}: {_name_of(event)} "
        if _is_hardware(event) and event.age_s <= CARD_EVENT_S and name not in known:
            faults.append(f"{name}{event.age_s:.0f} s ago")
    if evidence.process.state == "stuck":
        faults.append(f"process {evidence.process.pid} is in uninterruptible sleep (a driver or disk does not answer)")
    return faults


def _is_hardware(event: CardEvent) -> bool:
    return event.code in HARDWARE_XIDS if event.kind == "xid" else event.code == DOUBLE_BIT_ECC


def _name_of(event: CardEvent) -> str:
    return f"XID {event.code}" if event.kind == "xid" else f"ECC error of type {event.code}"


def _hardware(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    faults = _hardware_faults(evidence)
    # Of a stuck process only an answer of just now says anything.
    credited = any(answer.outcome == "credited" for answer in evidence.answers)
    if not faults or (_serves(evidence) and not (credited and evidence.process.state == "stuck")):
        return None
    what = "; ".join(faults)
    return Verdict(
        "api", "hardware", "hardware_fault", f"The hardware has failed: {what}. Reset the GPU or replace the instance; "
        "a restart of the service cannot help.", f"硬件故障：{what}。请重置显卡或更换实例，重启服务无济于事。",
        {"faults": faults}, "any fatal GPU error or stuck process", needed=limits.confirm_runs,
    )  # fmt: skip


def _port_taken(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if evidence.process.port_owner != "stranger":
        return None
    return port_taken("api", "API", evidence.process)


def _restarting(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    return restarting("api", "API", evidence.process) if evidence.process.restarting else None


def _process_gone(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if evidence.process.state != "gone":
        return None
    return process_gone("api", "API", evidence.process)


def _held_by_debugger(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if evidence.process.state != "traced":
        return None
    return Verdict(
        "api", "unknown", "held_by_debugger", f"A debugger holds process {evidence.process.pid}; it is left alone.",
        f"进程 {evidence.process.pid} 正被调试器控制，不作处理。", {"pid": evidence.process.pid},
    )  # fmt: skip


def _frozen_by_group(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    return frozen_by_group("api", "API", evidence.process, limits) if evidence.process.state == "frozen" else None


def _frozen(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    return _stands_still(evidence, limits) if evidence.process.state == "stopped" else None


def _other_process(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if not evidence.other:
        return None
    pid = evidence.process.pid
    ours_en = f"process {pid} that was started here" if pid else "one of this folder, where none was started"
    ours_zh = f"这里启动的进程 {pid}" if pid else "本目录的进程（这里没有启动任何进程）"
    return Verdict(
        "api", "broken", "other_process", f"{evidence.other.capitalize()} answers at {evidence.url}, not {ours_en}. "
        "End one of them, then run ./start.sh.", f"{evidence.url} 由另一个进程（{evidence.other}）应答，而不是{ours_zh}。"
        "请结束其中一个，再运行 ./start.sh。", {"answers": evidence.other, "pid": pid},
        f"pid and start time of /health must be those of the pid file, on {limits.confirm_runs} runs in a row", needed=limits.confirm_runs,
    )  # fmt: skip


def _corrupt(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """It computes wrongly, by its own guards: what it answers may look right and is not to be trusted."""
    found = evidence.report.corrupt
    if found is None:
        return None
    facts = {"nonfinite_recent": found.nonfinite_recent, "nonfinite_total": found.nonfinite_total, "fingerprint": found.fingerprint, "stage": found.fingerprint_stage}
    if found.nonfinite_recent >= NONFINITE_LIMIT:
        return Verdict(
            "api", "corrupt", "nonfinite", f"The model computes wrongly: {found.nonfinite_recent} results within ten minutes were "
            "not finite numbers.", f"模型计算出错：十分钟内有 {found.nonfinite_recent} 个结果不是有限数值。", facts,
            f"{NONFINITE_LIMIT} results that are not finite within ten minutes", cure=True,
        )  # fmt: skip
    if found.fingerprint == "differs":
        stage = found.fingerprint_stage or "?"
        return Verdict(
            "api", "corrupt", "fingerprint_differs", "The model computes wrongly: a fixed request no longer gives what it gave after "
            f"the start (first difference: {stage}).", f"模型计算出错：固定请求的结果与启动后不同（首个差异：{stage}）。", facts,
            "the digests of every stage must stay the same", cure=True,
        )  # fmt: skip
    return None


def _answers_right(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if not _serves(evidence):
        return None
    answers = [answer for answer in evidence.answers if answer.outcome != "skipped"]
    facts: dict[str, Any] = {answer.kind: answer.outcome for answer in answers}
    if evidence.no_credit:
        facts["no_credit"] = evidence.no_credit
    if evidence.traffic is not None:
        facts["users"] = {"answered": evidence.traffic.answered, "failed": evidence.traffic.failed}
    events = [f"GPU {event.card}: {_name_of(event)} {event.age_s:.0f} s ago" for event in evidence.report.card_events]
    if events:
        facts["card_events"] = events
    asked = [answer for answer in answers if answer.outcome == "right"]
    if not asked:
        return Verdict(
            "api", "healthy", "answers_right", "Users were answered just now by the very process that was started here, so no question "
            "was needed.", "刚刚已有用户得到本机所启动进程的回答，无需提问。", facts, "process, port and proof must agree",
        )  # fmt: skip
    slowest = max(answer.seconds for answer in asked)
    return Verdict(
        "api", "healthy", "answers_right", f"It answered real questions correctly in {slowest:.2f} s.",
        f"真实提问得到正确回答，用时 {slowest:.2f} 秒。", {"seconds": slowest, **facts}, "every question that was asked",
    )  # fmt: skip


def _flawed(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """What is wrong with an API that answers, or would if it were less busy."""
    for rule in (_hardware_warns, _users_fail, _reference_differs, _probe_token_differs, _no_pictures, _health_fails):
        verdict = rule(evidence, limits)
        if verdict is not None:
            return verdict
    return None


def _hardware_warns(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    faults = _hardware_faults(evidence)
    if not faults:
        return None
    what = "; ".join(faults)
    return Verdict(
        "api", "degraded", "hardware_warns", f"It answers, but the hardware reports: {what}.", f"仍能回答，但硬件报告：{what}。",
        {"faults": faults}, "any fatal GPU error or stuck process",
    )  # fmt: skip


def _users_fail(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """Once is told at once; a restart takes `confirm_runs` more runs, each with new failures."""
    traffic = evidence.traffic
    if traffic is None or not is_failing(traffic.answered, traffic.failures, limits):
        return None
    if not _concerns_others(evidence, limits):
        return None
    total, runs = traffic.answered + traffic.failures, 1 + limits.confirm_runs
    reasons = ", ".join(f"{reason} {many}" for reason, many in sorted(traffic.failed.items(), key=lambda pair: -pair[1]))
    cure = is_failing(traffic.answered, curable_failures(traffic), limits)
    stays = traffic.runs_failing >= runs
    minutes = f"{max(1.0, traffic.span_s / 60):.0f}"
    return Verdict(
        "api", "broken" if stays and cure else "degraded", "users_fail", f"{traffic.failures} of {total} users' requests failed within "
        f"{minutes} min ({100 * traffic.share:.0f} %; {reasons}), on {traffic.runs_failing} runs.",
        f"{minutes} 分钟内 {total} 个用户请求中有 {traffic.failures} 个失败（{100 * traffic.share:.0f}%；{reasons}），已连续 "
        f"{traffic.runs_failing} 次检查。", {"answered": traffic.answered, "failed": traffic.failed, "runs": traffic.runs_failing},
        f"at most {100 * limits.failure_share:g} % or fewer than {limits.failure_count}; a restart after {runs} runs",
        cure=stays and cure, attempts=2,
    )  # fmt: skip


def _concerns_others(evidence: ApiEvidence, limits: Limits) -> bool:
    """Failures that one user can cause at will are counted and shown; told only of several callers, or of a large share."""
    traffic = evidence.traffic
    assert traffic is not None
    own = sum(many for reason, many in traffic.failed.items() if reason in NOT_CURABLE and evidence.report.failed_callers.get(reason) == 1)
    return traffic.share > LARGE_SHARE or is_failing(traffic.answered, traffic.failures - own, limits)


def _reference_differs(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    found = evidence.report.corrupt
    if found is None or found.reference != "differs":
        return None
    what = found.reference_detail or "no detail"
    return Verdict(
        "api", "degraded", "reference_differs", "At its first load this model did not compute as its reference implementation does: "
        f"{what}. Its answers may be wrong; try another dtype or GLM_KERNELS=torch.",
        f"首次加载时，本模型的计算与参考实现不一致：{what}。回答可能有误；请尝试其他精度或 GLM_KERNELS=torch。", {"reference": what},
        "token count, positions and most likely token must be equal",
    )  # fmt: skip


def _probe_token_differs(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if evidence.unproven_runs < limits.confirm_runs:
        return None
    return Verdict(
        "api", "degraded", "probe_token_differs", "It answers, but cannot prove that the answer is its own and fresh: it was started "
        "with another GLM_PROBE_TOKEN (then run ./start.sh --restart when convenient), or something on the way changes or repeats its answers. "
        "Until then the checker's questions wait behind users, and are asked in every run.",
        "仍能回答，但无法证明应答出自本进程且为最新：启动时的 GLM_PROBE_TOKEN 与现在不同（请在方便时运行 ./start.sh --restart），或途中有程序改动或重放应答。"
        "在此期间检查提问要与用户一起排队，且每次都要提问。",
        {"runs": evidence.unproven_runs}, f"no valid proof on {limits.confirm_runs} runs in a row",
    )  # fmt: skip


def _no_pictures(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """The checker cannot draw, so that nothing is known of pictures."""
    answers = evidence.answers
    if not answers or answers[0].outcome in ("silent", "refused") or not any(answer.outcome == "skipped" for answer in answers):
        return None
    why = next(answer.detail for answer in answers if answer.outcome == "skipped")
    return Verdict(
        "api", "degraded", "pictures_not_asked", f"It answers text. Whether it understands pictures is not known: {why}. "
        "Restore the folder models/ of the project (git checkout models).",
        f"文字问答正常，但无法得知图片问答是否正常：{why}。请恢复项目的 models/ 目录（git checkout models）。", {"why": why},
        "a question about a picture must be asked",
    )  # fmt: skip


def _health_fails(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """Questions are answered, and /health is not, on which whoever else watches the service relies."""
    if evidence.process.state != "runs" or evidence.first.outcome != "failed" or (evidence.last is not None and evidence.last.outcome != "failed"):
        return None
    what = evidence.first.detail or "no valid answer"
    return Verdict(
        "api", "degraded", "health_route_fails", f"It answers questions, but GET /health fails: {what}.", f"能回答问题，但 GET /health 出错：{what}。",
        {"status": evidence.first.status}, "a state in JSON",
    )  # fmt: skip


def _engine_dead(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    reply = evidence.last or evidence.first
    if reply.state != "dead":
        return None
    why = reply.reason or "no reason given"
    return Verdict(
        "api", "dead", "engine_dead", f"The server answers, but its engine has ended: {why}",
        f"服务有响应，但推理引擎已停止：{why}", {"reason": why}, "as the engine reports", cure=True,
    )  # fmt: skip


def _loading(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """A large model over a slow disk may load for hours; one whose load does not move at all never ends."""
    beat = evidence.beat if not evidence.first.answered else None
    state = evidence.first.state or (beat.state if beat else "")
    if state != "loading":
        return None
    share = evidence.first.progress if evidence.first.progress is not None else (beat.progress if beat else None)
    done = f"{100 * share:.0f} %" if share is not None else "?"
    age_s, still_s = evidence.process.age_s, _loading_still_s(evidence)
    facts = {"progress": share, "age_s": age_s, "still_s": still_s}
    threshold = f"{limits.start_s:.0f} s without any progress"
    if still_s is not None and still_s > limits.start_s:
        return Verdict(
            "api", "broken", "loading_stands_still", f"Loading the model has made no progress for {still_s / 60:.0f} minutes ({done}), "
            f"{limits.start_s / 60:.0f} allowed.", f"模型加载已 {still_s / 60:.0f} 分钟没有任何进展（{done}），允许 "
            f"{limits.start_s / 60:.0f} 分钟。", facts, threshold, cure=True, needed=limits.confirm_runs, attempts=1,
        )  # fmt: skip
    if still_s is None:
        longest_s = max(limits.start_s, LOADING_BY_AGE_S)
        threshold = f"{longest_s:.0f} s from the start of the process"
        if age_s is not None and age_s > longest_s:
            return Verdict(
                "api", "broken", "loading_too_long", f"The model has been loading for {age_s / 60:.0f} minutes ({done}), "
                f"longer than {longest_s / 60:.0f}.", f"模型已加载 {age_s / 60:.0f} 分钟（{done}），超过上限 "
                f"{longest_s / 60:.0f} 分钟。", facts, threshold, cure=True, needed=limits.confirm_runs, attempts=1,
            )  # fmt: skip
    return Verdict(
        "api", "starting", "loading", f"The model is loading ({done}).", f"模型正在加载（{done}）。", facts, threshold
    )


def _loading_still_s(evidence: ApiEvidence) -> float | None:
    """None if the API does not say, as older ones. The time since the file was written counts too: its writer may be blocked."""
    if evidence.first.answered:
        return evidence.first.report.loading_still_s
    beat = evidence.beat
    if beat is None or beat.report.loading_still_s is None:
        return None
    return beat.report.loading_still_s + beat.written_age_s


def _stalled(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """Work is pending and no step was made before the deadline, according to /health or the heartbeat file."""
    stalled = _stalled_for(evidence, limits)
    if stalled is None:
        return None
    for_s, deadline_s, phase, source = stalled
    if _progressed(evidence):
        return None
    return Verdict(
        "api", "wedged", "no_progress", f"The engine has work but has made no step for {for_s:.0f} s"
        f" (phase {phase or 'unknown'}, {deadline_s:.0f} s allowed).",
        f"引擎有任务，但已 {for_s:.0f} 秒没有任何进展（阶段 {phase or '未知'}，允许 {deadline_s:.0f} 秒）。",
        {"no_progress_s": for_s, "phase": phase, "source": source, "gpu": "see evidence"},
        f"{deadline_s:.0f} s without a step while work is pending", cure=True,
    )  # fmt: skip


def _stalled_for(evidence: ApiEvidence, limits: Limits) -> tuple[float, float, str, str] | None:
    """(seconds without progress, seconds allowed, phase, source) if the latest evidence is past the deadline."""
    reply = evidence.last or evidence.first
    if reply.answered and reply.pending and reply.no_progress_s is not None:
        deadline_s = _allowed_s(reply.deadline_s, limits)
        if reply.no_progress_s > deadline_s:
            return reply.no_progress_s, deadline_s, reply.phase, "health"
        return None
    beat = evidence.beat
    if beat is not None and beat.written_age_s <= BEAT_STALE_S and beat.pending:
        deadline_s = _allowed_s(beat.deadline_s, limits)
        if beat.no_progress_s > deadline_s:
            return beat.no_progress_s, deadline_s, beat.phase, "heartbeat file"
    return None


def _allowed_s(phase_deadline_s: float | None, limits: Limits) -> float:
    """The engine's estimate for its phase may raise the limit, never lower it: an estimate must not cause a restart."""
    return max(phase_deadline_s or 0.0, limits.stall_s)


def _draining(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if evidence.first.state != "draining":
        return None
    if evidence.draining_s is not None and evidence.draining_s > limits.stop_s + DRAIN_MARGIN_S:
        return Verdict(
            "api", "broken", "drains_without_end", f"The API has been shutting down for {evidence.draining_s:.0f} s and does not end "
            f"({limits.stop_s:.0f} s are allowed).",
            f"接口关闭已持续 {evidence.draining_s:.0f} 秒仍未结束（最多允许 {limits.stop_s:.0f} 秒）。",
            {"draining_s": evidence.draining_s}, f"{limits.stop_s:.0f} s and {DRAIN_MARGIN_S:.0f} s more", cure=True,
        )  # fmt: skip
    return Verdict(
        "api", "degraded", "draining", "The API is shutting down: new questions belong elsewhere.", "接口正在关闭，请勿再提交新问题。"
    )


def _key_refused(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    for answer in evidence.answers:
        if answer.outcome == "rejected" and answer.status in (401, 403):
            return Verdict(
                "api", "broken", "key_refused", "The API refused the checker's key: GLM_API_KEY is not the one it was "
                f"started with (HTTP {answer.status}).", f"接口拒绝了检查程序的密钥：GLM_API_KEY 与启动时不同（HTTP {answer.status}）。",
                {"status": answer.status}, needed=limits.confirm_runs,
            )  # fmt: skip
    return None


def _out_of_reach(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """The process listens, by the kernel's word, and was never asked: the address is wrong, or its name is not resolved."""
    reply, process = evidence.last or evidence.first, evidence.process
    lost = reply.outcome == "refused" or (reply.outcome == "failed" and reply.detail.startswith(UNREACHED))
    if not lost or not process.alive or process.port_owner != "ours" or _is_fresh(evidence):
        return None
    return Verdict(
        "api", "broken", "address_unreachable", f"Process {process.pid} runs and listens, but not at {evidence.url} ({reply.detail or reply.outcome}), "
        "where the checker and the page ask it: see GLM_API_URL, GLM_API_HOST, GLM_API_PORT and the name service. A restart cannot help.",
        f"进程 {process.pid} 在运行并监听，但检查程序和页面所用的地址 {evidence.url} 无法到达它（{reply.detail or reply.outcome}）：请检查 "
        "GLM_API_URL、GLM_API_HOST、GLM_API_PORT 和域名解析。重启无济于事。", {"detail": reply.detail, "pid": process.pid},
        f"on {limits.confirm_runs} runs in a row", needed=limits.confirm_runs,
    )  # fmt: skip


def _silent(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """The kernel accepts connections, but the server does not answer."""
    reply = evidence.last or evidence.first
    if reply.answered or reply.outcome == "refused" or evidence.process.state == "gone":
        return None
    # A server that has written a heartbeat is past its start.
    if evidence.beat is None and _is_fresh(evidence):
        return _starting(evidence)
    if evidence.process.out_of_files:
        return _no_files_left(evidence, limits)
    beat = evidence.beat
    if beat is not None and beat.beat_age_s <= BEAT_STALE_S:
        return _silent_but_beating(evidence, limits)
    if beat is None and evidence.process.state == "unrecorded":
        return _no_valid_reply(reply, limits)
    return _stands_still(evidence, limits)


def _no_valid_reply(reply: HealthReply, limits: Limits) -> Verdict:
    """Of a server that was not started here, such as an external engine: it has no heartbeat, only its reply."""
    what = reply.detail or reply.outcome
    silent = reply.outcome == "silent"
    came_en, came_zh = ("nothing complete came back", "没有完整的应答") if silent else ("what came back is no valid HTTP reply", "返回的不是有效的 HTTP 应答")
    return Verdict(
        "api", "zombie" if silent else "broken", "no_valid_reply", f"The server accepts connections, but to GET /health {came_en}: {what}.",
        f"服务器接受连接，但对 GET /health {came_zh}：{what}。", {"reply": reply.detail, "seconds": reply.seconds},
        f"a whole HTTP reply in time, on {limits.confirm_runs} runs in a row", cure=True, needed=limits.confirm_runs + 1,
    )  # fmt: skip


def _stands_still(evidence: ApiEvidence, limits: Limits) -> Verdict:
    beat_age_s = evidence.beat.beat_age_s if evidence.beat else None
    age_en = "has no heartbeat" if beat_age_s is None else f"has not beaten for {beat_age_s:.0f} s"
    age_zh = "没有心跳" if beat_age_s is None else f"已 {beat_age_s:.0f} 秒没有跳动"
    frozen = evidence.process.state == "stopped"
    long_enough = beat_age_s is None or beat_age_s >= limits.beat_s
    return Verdict(
        "api", "zombie", "frozen" if frozen else "loop_stands_still",
        f"The API accepts connections but answers nothing, and its event loop {age_en}"
        + (" (the process was stopped by a signal)." if frozen else "."),
        f"接口接受连接但毫无应答，事件循环{age_zh}" + ("（进程被信号暂停）。" if frozen else "。"), _beat_facts(evidence),
        f"no beat for {limits.beat_s:.0f} s, on {limits.confirm_runs} runs in a row",
        # Without a heartbeat one more run must confirm it.
        cure=long_enough, needed=limits.confirm_runs + (1 if beat_age_s is None else 0),
    )  # fmt: skip


def _no_files_left(evidence: ApiEvidence, limits: Limits) -> Verdict:
    """It can neither accept a connection nor write its heartbeat. Idle connections are closed soon, so it may recover."""
    files, most, runs = evidence.process.open_files, evidence.process.open_files_limit, limits.confirm_runs + 3
    return Verdict(
        "api", "broken", "no_files_left", f"The API has no file descriptors left: {files} of {most} are in use, so it accepts no "
        "connections.", f"接口的文件描述符已用尽：{most} 个中已用 {files} 个，无法接受新连接。",
        {"open_files": files, "open_files_limit": most, **_beat_facts(evidence)}, f"fewer than 95 % in use; a restart after {runs} runs in a row",
        cure=True, needed=runs, attempts=1,
    )  # fmt: skip


def _beat_facts(evidence: ApiEvidence) -> dict[str, Any]:
    beat_age_s = evidence.beat.beat_age_s if evidence.beat else None
    return {"beat_age_s": beat_age_s, "process": evidence.process.state, "pid": evidence.process.pid}


def _silent_but_beating(evidence: ApiEvidence, limits: Limits) -> Verdict:
    """Takes more runs to confirm, because a slow machine answers late too; busy while the engine has work."""
    facts = _beat_facts(evidence)
    if evidence.beat is not None and evidence.beat.pending:
        return Verdict(
            "api", "busy", "slow_http", "The API is slow to answer over HTTP, but its event loop beats and its engine works.",
            "接口 HTTP 响应缓慢，但事件循环仍在跳动，引擎仍在工作。", facts, f"a beat within {BEAT_STALE_S:.0f} s",
        )  # fmt: skip
    return Verdict(
        "api", "zombie", "silent_but_beating", "The API does not answer over HTTP, although its event loop beats and its "
        "engine is idle; connections may be exhausted.", "事件循环仍在跳动、引擎空闲，但接口没有 HTTP 响应，可能是连接耗尽。", facts,
        f"on {limits.confirm_runs + 3} runs in a row", cure=True, needed=limits.confirm_runs + 3, attempts=1,
    )  # fmt: skip


def _is_fresh(evidence: ApiEvidence) -> bool:
    return evidence.process.age_s is not None and evidence.process.age_s < FRESH_PROCESS_S


def _starting(evidence: ApiEvidence) -> Verdict:
    age_s = evidence.process.age_s or 0.0
    return Verdict(
        "api", "starting", "process_fresh", f"The process is {age_s:.0f} s old and opens its port soon.",
        f"进程刚启动 {age_s:.0f} 秒，端口即将打开。", {"age_s": age_s}, f"{FRESH_PROCESS_S:.0f} s",
    )  # fmt: skip


def _nothing_listens(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    if evidence.first.outcome != "refused":
        return None
    if evidence.process.state == "unrecorded":
        why = evidence.process.start_failure
        return Verdict(
            "api", "dead", "not_started",
            f"Nothing listens at {evidence.url}, and no process was started here by start.sh." + (f" The last start failed: {why}" if why else ""),
            f"{evidence.url} 无人监听，本机也没有由 start.sh 启动的进程。" + (f"上次启动失败：{why}" if why else ""),
            {"start_failure": why} if why else {}, "run ./start.sh",
        )  # fmt: skip
    if _is_fresh(evidence):
        return _starting(evidence)
    return Verdict(
        "api", "dead", "port_closed", f"Process {evidence.process.pid} runs, but nothing listens at {evidence.url}.",
        f"进程 {evidence.process.pid} 在运行，但 {evidence.url} 无人监听。", {"age_s": evidence.process.age_s},
        f"{FRESH_PROCESS_S:.0f} s after its start",
        cure=True, needed=limits.confirm_runs,
    )  # fmt: skip


def _busy(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """Questions were rejected or timed out, but the engine makes steps or is within its deadline."""
    waiting = [answer for answer in evidence.answers if _unserved(answer)]
    failed = [answer for answer in evidence.answers if not answer.good and answer.outcome != "skipped" and answer not in waiting]
    if not waiting or failed:
        return None
    reply = evidence.last or evidence.first
    steps_en = steps_zh = ""
    if _progressed(evidence) and evidence.first.steps is not None and reply.steps is not None:
        steps_en = f", while the engine made {reply.steps - evidence.first.steps} steps"
        steps_zh = f"，期间引擎前进了 {reply.steps - evidence.first.steps} 步"
    elif not reply.pending:
        return None
    elif not _progressed(evidence):
        allowed_s = _allowed_s(reply.deadline_s, limits)
        steps_en = f", and one step is under way for {reply.no_progress_s or 0:.0f} s of {allowed_s:.0f} allowed"
        steps_zh = f"，当前一步已进行 {reply.no_progress_s or 0:.0f} 秒（允许 {allowed_s:.0f} 秒）"
    slowest = waiting[0]
    return Verdict(
        "api", "busy", "busy", f"It is busy: a question got no answer within {slowest.seconds:.0f} s{steps_en}.",
        f"服务繁忙：{slowest.seconds:.0f} 秒内没有轮到提问{steps_zh}。",
        {"pending": reply.pending, "no_progress_s": reply.no_progress_s, "phase": reply.phase},
        "steps are made, or the phase is within its deadline",
    )  # fmt: skip


def _unanswered(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    """The engine is idle, or does not say whether it works, but a question got no answer."""
    lost = [answer for answer in evidence.answers if _unserved(answer)]
    if not lost:
        return None
    what = lost[0].detail or "no answer"
    reply = evidence.last or evidence.first
    state_en, state_zh = "reports that it is idle", "显示空闲"
    if reply.pending is None:
        state_en, state_zh = f"does not say whether it has work ({reply.detail or 'no count'})", f"未说明是否有任务（{reply.detail or '无计数'}）"
    return Verdict(
        "api", "broken", "lost_question", f"The engine {state_en}, but a {lost[0].kind} question got no answer: {what}.",
        f"引擎{state_zh}，但{_kind_zh(lost[0])}提问没有回答：{what}。", {"seconds": lost[0].seconds},
        f"on {limits.confirm_runs} runs in a row", cure=True, needed=limits.confirm_runs, attempts=2,
    )  # fmt: skip


def _failed(evidence: ApiEvidence, limits: Limits) -> Verdict | None:
    failed = [answer for answer in evidence.answers if not answer.good and answer.outcome != "skipped"]
    if not failed:
        return None
    first = failed[0]
    good = [answer.kind for answer in evidence.answers if answer.good]
    besides_en = f" ({good[0]} questions still work)" if good else ""
    besides_zh = f"（{'文字' if good[0] == 'text' else '图片'}提问仍正常）" if good else ""
    if first.outcome == "wrong":
        en = f"The {first.kind} question was answered wrongly: expected {first.expected}, got {first.text!r}{besides_en}."
        zh = f"{_kind_zh(first)}提问的回答有误：应为 {first.expected}，实为 {first.text!r}{besides_zh}。"
    else:
        what = first.detail or f"HTTP {first.status}"
        en = f"The {first.kind} question failed: {what}{besides_en}."
        zh = f"{_kind_zh(first)}提问失败：{what}{besides_zh}。"
    # A new process would reject a bad request too.
    curable = not (first.outcome == "rejected" and 400 <= first.status < 500)
    return Verdict(
        "api", "broken", f"{first.kind}_{first.outcome}", en, zh,
        {"status": first.status, "expected": first.expected, "answer": first.text},
        f"on {limits.confirm_runs} runs in a row", cure=curable, needed=limits.confirm_runs, attempts=2,
    )  # fmt: skip


def _unserved(answer: Answer) -> bool:
    return answer.outcome == "silent" or (answer.outcome == "rejected" and answer.status in (429, 503))


def _progressed(evidence: ApiEvidence) -> bool:
    if evidence.last is None or evidence.last.steps is None or evidence.first.steps is None:
        return False
    return evidence.last.steps > evidence.first.steps


def _kind_zh(answer: Answer) -> str:
    return "文字" if answer.kind == "text" else "图片"
