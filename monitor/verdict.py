"""From evidence to a verdict: a pure function, no clock, no I/O.

`healthy` and `busy` serve people; everything else does not. Busy is not dead: a question that finds no room,
while the engine makes steps, says nothing against the service.
"""

from __future__ import annotations

from dataclasses import dataclass

from monitor.probes import Answer, Reply

SERVING = ("healthy", "busy")


@dataclass(frozen=True)
class Evidence:
    """What the probes found. `page` is None where the page was deliberately not started."""

    api_url: str
    health: Reply
    answer: Answer
    health_after: Reply | None
    page: Reply | None
    api_process: str = ""


@dataclass(frozen=True)
class Verdict:
    """`word` is one of healthy, busy, starting, degraded, broken, wedged, zombie, dead, unknown."""

    word: str
    reasons: tuple[str, ...] = ()

    @property
    def serving(self) -> bool:
        return self.word in SERVING


def judge(evidence: Evidence) -> Verdict:
    api = _judge_api(evidence)
    page_problem = _page_problem(evidence.page)
    if not page_problem:
        return api
    word = "degraded" if api.serving else api.word
    return Verdict(word, (*api.reasons, page_problem))


def _judge_api(evidence: Evidence) -> Verdict:
    health, answer = evidence.health, evidence.answer
    state = (health.body or {}).get("state")
    if answer.outcome == "right":
        return Verdict("healthy")
    if health.outcome == "refused":
        return Verdict("dead", (f"nothing listens at {evidence.api_url}", evidence.api_process))
    if state == "loading":
        progress = (health.body or {}).get("progress")
        return Verdict("starting", (f"the model is loading ({_percent(progress)})",))
    if state == "dead":
        reason = (health.body or {}).get("reason") or "no reason given"
        return Verdict("dead", (f"the API says that its engine is dead: {reason}",))
    if state == "draining":
        return Verdict("degraded", ("the API is shutting down",))
    if answer.outcome == "rejected" and answer.status in (401, 403):
        cause = "GLM_API_KEY is not the one the API was started with"
        return Verdict("broken", (f"the API refused the checker's key (HTTP {answer.status}): {cause}",))
    if answer.outcome == "wrong":
        return Verdict("broken", (f"asked for the color of {answer.expected}, the model answered {answer.text!r}",))
    if answer.outcome == "silent" or answer.status == 503:
        return _judge_unanswered(evidence)
    return Verdict("broken", (f"the question was not answered: {answer.detail} (HTTP {answer.status or 'none'})",))


def _judge_unanswered(evidence: Evidence) -> Verdict:
    what = f"a question got no answer within {evidence.answer.seconds:.1f} s"
    if evidence.answer.status == 503:
        what = f"a question was turned away: {evidence.answer.detail}"
    after = evidence.health_after
    if evidence.health.outcome != "answered" and (after is None or after.outcome != "answered"):
        return Verdict("zombie", (f"{evidence.api_url} accepts connections but answers nothing", what))
    before_steps, after_steps = _steps(evidence.health), _steps(after)
    if before_steps is not None and after_steps is not None and after_steps > before_steps:
        return Verdict("busy", (f"{what}, while the engine made {after_steps - before_steps} steps",))
    return Verdict("wedged", (f"{what}, and the engine made no step in that time",))


def _page_problem(page: Reply | None) -> str:
    if page is None or (page.outcome == "answered" and page.status == 200):
        return ""
    return f"the page does not answer: {page.detail or f'HTTP {page.status}'}"


def _steps(reply: Reply | None) -> int | None:
    steps = (reply.body or {}).get("steps") if reply is not None else None
    return steps if isinstance(steps, int) else None


def _percent(progress: object) -> str:
    return f"{100 * progress:.0f} %" if isinstance(progress, int | float) else "no progress told"
