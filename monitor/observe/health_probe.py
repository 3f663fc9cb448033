"""GET /health with a nonce, and the proof that the answer is fresh and comes from a server with the same probe token."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from typing import Any

from monitor.judge.evidence import HealthReply
from monitor.observe import self_report
from monitor.observe.http_exchange import exchange

NONCE_BYTES = 16


def get_health(base_url: str, limit_s: float, token: str = "") -> HealthReply:
    """Never raises, whatever answers. With a probe token the reply says whether the server has proven that it knows it."""
    nonce = secrets.token_hex(NONCE_BYTES) if token else ""
    reply = exchange(f"{base_url}/health" + (f"?nonce={nonce}" if nonce else ""), limit_s)
    body = reply.json() or {}
    state = self_report.text(body.get("state"), 40)
    if reply.outcome == "answered" and not state:
        return HealthReply("failed", reply.seconds, reply.status, detail=f"HTTP {reply.status} without a state")
    running, waiting = self_report.count(body.get("running")), self_report.count(body.get("waiting"))
    ages = {self_report.text(kind, 16): self_report.number(age) for kind, age in self_report.mapping(body.get("success_age_s")).items()}
    return HealthReply(
        outcome=reply.outcome,
        seconds=reply.seconds,
        status=reply.status,
        state=state,
        phase=self_report.text(body.get("phase"), 40),
        steps=self_report.count(body.get("steps")),
        pending=None if running is None or waiting is None else running + waiting,
        no_progress_s=self_report.number(body.get("no_progress_s")),
        deadline_s=self_report.number(body.get("phase_deadline_s")),
        progress=self_report.number(body.get("progress")),
        reason=self_report.text(body.get("reason")),
        detail=reply.detail,
        success_age_s={kind: age for kind, age in ages.items() if age is not None},
        proven=is_proven(body, nonce, token) if token else None,
        report=self_report.parse(body),
        unanswered_s=self_report.number(self_report.mapping(body.get("engine")).get("unanswered_s")),
    )


def is_proven(body: dict[str, Any], nonce: str, token: str) -> bool | None:
    """Whether `proof` is the HMAC of the nonce and the rest of the body under the token; None without a proof."""
    if "proof" not in body:
        return None
    rest = {name: value for name, value in body.items() if name != "proof"}
    try:
        said = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except (ValueError, RecursionError):
        return False
    expected = hmac.new(token.encode(), f"{nonce}\n{said}".encode(), hashlib.sha256).hexdigest()
    given = body["proof"]
    return isinstance(given, str) and hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace"))
