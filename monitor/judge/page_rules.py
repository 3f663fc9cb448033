"""The rules for the page: pure functions from evidence to a verdict."""

from __future__ import annotations

from monitor.judge.evidence import ApiEvidence, PageEvidence, PageReply
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

REFUSED = (401, 403)


def judge_page(evidence: PageEvidence, limits: Limits, api: ApiEvidence | None = None) -> Verdict:
    """`api`: what was seen of the API in the same run, which the page may be unable to ask."""
    blind = checker_blind(evidence, limits)
    if blind is not None:
        return blind
    process = evidence.process
    if process.restarting:
        return restarting("page", "page", process)
    if process.port_owner == "stranger":
        return port_taken("page", "page", process)
    if process.state == "gone":
        return process_gone("page", "page", process)
    if process.state == "traced":
        return Verdict("page", "unknown", "held_by_debugger", "A debugger holds the page.", "页面进程正被调试器控制。")
    if process.state == "frozen":
        return frozen_by_group("page", "page", process, limits)
    if not evidence.health.good:
        return _does_not_answer(evidence, limits)
    verdict = _behind_the_server(evidence, limits)
    return (_cut_off_from_the_api(evidence, limits, api) or verdict) if verdict.serving else verdict


def _does_not_answer(evidence: PageEvidence, limits: Limits) -> Verdict:
    process, health = evidence.process, evidence.health
    if health.outcome == "refused" and process.state == "unrecorded":
        why = process.start_failure
        return Verdict(
            "page", "dead", "not_started",
            f"Nothing listens at {evidence.url}, and no page was started here by start.sh." + (f" The last start failed: {why}" if why else ""),
            f"{evidence.url} 无人监听，本机也没有由 start.sh 启动的页面。" + (f"上次启动失败：{why}" if why else ""),
            {"start_failure": why} if why else {}, "run ./start.sh",
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
    if evidence.tokenless is not None and evidence.tokenless.status == 200:
        return Verdict(
            "page", "degraded", "page_without_token", "The page works, but for everybody: it was started without GLM_WEB_TOKEN, which is set now. "
            "A restart would end the sessions of its users, so it is left to you: ./start.sh --restart web.",
            "页面正常，但对所有人开放：启动时没有 GLM_WEB_TOKEN，而现在已设置。重启会中断用户会话，因此由您决定：./start.sh --restart web。",
            {"status": evidence.tokenless.status}, "without the token nothing may be shown",
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


def _cut_off_from_the_api(evidence: PageEvidence, limits: Limits, api: ApiEvidence | None) -> Verdict | None:
    """The page keeps the key and the address that it was started with. It is not restarted for them: an edit of `.env` may be half done."""
    contact, needed = evidence.api_contact, limits.confirm_runs
    if contact is None:
        return None
    facts = {"status": contact.status, "address": contact.address}
    if contact.answer == "refused":
        checker_too = api is not None and any(answer.status in REFUSED for answer in api.answers)
        command = "./start.sh --restart" if checker_too else "./start.sh --restart web"
        return Verdict(
            "page", "broken", "page_key_refused", f"The page runs, but every question on it fails: the API at {contact.address} refuses the "
            f"page's key (HTTP {contact.status}). GLM_API_KEY has changed since one of them was started. A restart would end the "
            f"sessions of the page's users, so it is left to you: {command}.",
            f"页面在运行，但页面上的每个问题都会失败：{contact.address} 的接口拒绝了页面的密钥（HTTP {contact.status}）。其中一方启动后 "
            f"GLM_API_KEY 已更改。重启会中断用户会话，因此由您决定：{command}。",
            facts, f"on {limits.confirm_runs} runs in a row", needed=needed,
        )  # fmt: skip
    if contact.answer == "unreachable" and api is not None and _is_up(api):
        why_en, why_zh = (f"HTTP {contact.status}",) * 2 if contact.status else ("no answer", "没有应答")
        return Verdict(
            "page", "broken", "page_cannot_reach_api", f"The page runs, but every question on it fails: it asks the API at {contact.address} "
            f"({why_en}), while {api.url} answers the checker. GLM_API_URL or GLM_API_PORT has changed since the page was started. "
            "A restart would end the sessions of its users, so it is left to you: ./start.sh --restart web.",
            f"页面在运行，但页面上的每个问题都会失败：它访问的接口是 {contact.address}（{why_zh}），而 {api.url} 能响应检查程序。"
            "页面启动后 GLM_API_URL 或 GLM_API_PORT 已更改。重启会中断用户会话，因此由您决定：./start.sh --restart web。",
            {**facts, "checked": api.url}, f"on {limits.confirm_runs} runs in a row", needed=needed,
        )  # fmt: skip
    return None


def _is_up(api: ApiEvidence) -> bool:
    return api.first.answered and api.first.status == 200


def _why(reply: PageReply) -> str:
    return reply.detail or f"HTTP {reply.status}"
