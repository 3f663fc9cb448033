"""The rules for the page: pure functions from evidence to a verdict."""

from __future__ import annotations

from monitor.judge.evidence import PageEvidence, PageReply
from monitor.judge.verdict import FRESH_PROCESS_S, Limits, Verdict, checker_blind, port_taken, process_gone


def judge_page(evidence: PageEvidence, limits: Limits) -> Verdict:
    blind = checker_blind(evidence, limits)
    if blind is not None:
        return blind
    process = evidence.process
    if process.port_owner == "stranger":
        return port_taken("page", "page", process)
    if process.state == "gone":
        return process_gone("page", "page", process)
    if process.state == "traced":
        return Verdict("page", "unknown", "held_by_debugger", "A debugger holds the page.", "页面进程正被调试器控制。")
    if not evidence.health.good:
        return _does_not_answer(evidence, limits)
    return _behind_the_server(evidence, limits)


def _does_not_answer(evidence: PageEvidence, limits: Limits) -> Verdict:
    process, health = evidence.process, evidence.health
    if health.outcome == "refused" and process.state == "unrecorded":
        return Verdict(
            "page", "dead", "not_started", f"Nothing listens at {evidence.url}, and no page was started here by start.sh.",
            f"{evidence.url} 无人监听，本机也没有由 start.sh 启动的页面。", threshold="run ./start.sh",
        )  # fmt: skip
    if process.age_s is not None and process.age_s < FRESH_PROCESS_S:
        return Verdict(
            "page", "starting", "process_fresh", f"The page's process is {process.age_s:.0f} s old.",
            f"页面进程刚启动 {process.age_s:.0f} 秒。", {"age_s": process.age_s}, f"{FRESH_PROCESS_S:.0f} s",
        )  # fmt: skip
    word = {"refused": "dead", "silent": "zombie"}.get(health.outcome, "broken")
    why = _why(health)
    return Verdict(
        "page", word, f"page_{health.outcome}", f"The page does not answer: {why}.", f"页面没有响应：{why}。",
        {"process": process.state, "status": health.status}, f"on {limits.confirm_runs} runs in a row",
        cure=process.alive, needed=limits.confirm_runs,
    )  # fmt: skip


def _behind_the_server(evidence: PageEvidence, limits: Limits) -> Verdict:
    """The page's server answers; checks the token, the WebSocket, the script and the reverse proxy."""
    if evidence.token is not None and evidence.token.status == 401:
        return Verdict(
            "page", "broken", "token_refused", "The page refused the checker's token: GLM_WEB_TOKEN is not the one it was started with "
            "(HTTP 401). A restart would end the sessions of its users, so it is left to you: ./start.sh --restart.",
            "页面拒绝了检查程序的令牌：GLM_WEB_TOKEN 与启动时不同（HTTP 401）。重启会中断用户会话，因此由您决定：./start.sh --restart。",
            {"status": evidence.token.status}, f"on {limits.confirm_runs} runs in a row", needed=limits.confirm_runs,
        )  # fmt: skip
    if evidence.websocket is not None and not evidence.websocket.good:
        why = _why(evidence.websocket)
        return Verdict(
            "page", "broken", "websocket", f"The page loads but cannot connect to its server: WebSocket {why}.",
            f"页面能打开，但连不上它的服务：WebSocket {why}。", {"status": evidence.websocket.status},
            f"on {limits.confirm_runs} runs in a row", cure=True, needed=limits.confirm_runs, attempts=2,
        )  # fmt: skip
    if evidence.script is not None and not evidence.script.good and evidence.script.status != 404:
        why = _why(evidence.script)
        return Verdict(
            "page", "broken", "page_script", f"The page's server runs, but the page itself fails: {why}.",
            f"页面服务在运行，但页面本身出错：{why}。", {"status": evidence.script.status},
            f"on {limits.confirm_runs} runs in a row", cure=True, needed=limits.confirm_runs, attempts=1,
        )  # fmt: skip
    if evidence.front is not None and not evidence.front.good:
        why = _why(evidence.front)
        return Verdict(
            "page", "degraded", "front", f"The page works on this machine, but not through the reverse proxy: {why}.",
            f"本机访问页面正常，但经反向代理访问失败：{why}。", {"status": evidence.front.status},
        )  # fmt: skip
    return Verdict(
        "page", "healthy", "page_answers", f"The page answered in {evidence.health.seconds:.2f} s.",
        f"页面 {evidence.health.seconds:.2f} 秒内响应。", {"seconds": evidence.health.seconds},
    )  # fmt: skip


def _why(reply: PageReply) -> str:
    return reply.detail or f"HTTP {reply.status}"
