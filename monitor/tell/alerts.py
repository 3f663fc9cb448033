"""Which alerts are sent, and when: on changes only, once, and in order.

An incident is one message when it opens and one when it closes, with reminders while it lasts without a break. Incidents
that open in the same run share a message. Messages wait in the store's outbox until the channel accepts them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from datetime import time as clock_time
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from zoneinfo import ZoneInfo

from monitor.judge import holds
from monitor.judge.history import Change, History, Incident
from monitor.judge.limiter import Decision
from monitor.judge.readings import SLOWER
from monitor.judge.replica_rules import RULE as REPLICAS
from monitor.judge.verdict import Verdict
from monitor.observe.http_exchange import Deadline, exchange
from monitor.store.store import Store
from monitor.tell import channels
from monitor.tell.redaction import redact
from settings import Settings

REMIND_AFTER_S = (1800.0, 7200.0, 21600.0)
REMIND_EVERY_S = 86400.0
SEND_LIMIT_S = 8.0
PING_LIMIT_S = 5.0
GIVE_UP_AFTER_S = 2 * 86400.0
DIGEST_ABOVE = 5
RUNBOOK = "docs/operations.md"


def compose(
    changes: list[Change], changed_warnings: list[dict[str, Any]], decisions: Mapping[str, Decision], verdicts: Mapping[str, Verdict],
    histories: dict[str, History], settings: Settings, now: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The messages of this run: {kind, severity, incident, en, zh}. Updates the reminder counts in `histories`."""
    messages = []
    opened = [c for c in changes if c.kind == "opened" and c.incident]
    closed = [c for c in changes if c.kind == "closed" and c.incident]
    if opened:
        messages.append(_fire(opened, decisions))
    if closed:
        messages.append(_resolve(closed))
    for target, decision in decisions.items():
        if decision.opens:
            messages.append(_circuit(target, decision, histories[target].incident))
        if decision.tells:
            messages.append(_person(target, decision, histories[target].incident))
    for target, history in histories.items():
        reminder = _reminder(history.incident, now) if history.seen else None
        if reminder and history.incident:
            histories[target] = replace(history, incident=replace(history.incident, reminders=history.incident.reminders + 1))
            messages.append(reminder)
    messages += [_degraded(change) for change in changes if change.kind == "flip" and _tells_of_degraded(change)]
    # A slowness is told by its verdict; its warning is for the report and the metrics.
    messages += [_warning(item) for item in changed_warnings if item["name"] != SLOWER]
    return messages


def of_replica(messages: list[dict[str, Any]], number: int | None) -> list[dict[str, Any]]:
    """The messages of a replica's run, which name it; of any other run as they are."""
    if number is None:
        return messages
    return [{**each, "en": f"Replica {number}: {each['en']}", "zh": f"副本 {number}：{each['zh']}"} for each in messages]


def _tells_of_degraded(change: Change) -> bool:
    """A target that serves users with something wrong has no incident, and is told all the same. Draining is meant.

    Of replicas that do not serve each says so itself.
    """
    if change.rule == REPLICAS:
        return False
    began = change.after == "degraded" and change.rule != "draining"
    return began or (change.before == "degraded" and change.after == "healthy")


def _degraded(change: Change) -> dict[str, Any]:
    began = change.after == "degraded"
    state_en, state_zh = ("degraded", "降级") if began else ("no longer degraded", "不再降级")
    runbook_en, runbook_zh = (f" Runbook: {RUNBOOK}#{change.rule}", f"手册：{RUNBOOK}#{change.rule}") if began else ("", "")
    return {
        "kind": "fire" if began else "resolve", "severity": "warn", "incident": f"degraded-{change.target}",
        "en": f"{change.target}: {state_en}. {change.en}{runbook_en}", "zh": f"{change.target}：{state_zh}。{change.zh}{runbook_zh}",
    }  # fmt: skip


def _fire(opened: list[Change], decisions: Mapping[str, Decision]) -> dict[str, Any]:
    en, zh, names = [], [], []
    for change in opened:
        assert change.incident is not None
        names.append(change.incident.id)
        decision = decisions.get(change.target)
        action_en = f" Action: {decision.kind} ({decision.reason})." if decision and decision.kind != "none" else ""
        action_zh = f"处理：{decision.kind}（{decision.reason}）。" if decision and decision.kind != "none" else ""
        en.append(f"{change.target}: {change.after}. {change.en}{action_en} Runbook: {RUNBOOK}#{change.rule}")
        zh.append(f"{change.target}：{change.after}。{change.zh}{action_zh}手册：{RUNBOOK}#{change.rule}")
    return {"kind": "fire", "severity": "page", "incident": ",".join(names), "en": "\n".join(en), "zh": "\n".join(zh)}


def _resolve(closed: list[Change]) -> dict[str, Any]:
    en, zh, names = [], [], []
    for change in closed:
        incident = change.incident
        assert incident is not None
        names.append(incident.id)
        lasted = _duration((incident.recovered_at or change.at) - incident.first_seen_at)
        flaps_en = f", {incident.flaps} relapses" if incident.flaps else ""
        flaps_zh = f"，复发 {incident.flaps} 次" if incident.flaps else ""
        en.append(
            f"{incident.target}: recovered and stable. It was {incident.word} for {lasted} ({incident.rule}), "
            f"{incident.restarts} restart(s){flaps_en}."
        )
        zh.append(
            f"{incident.target}：已恢复并稳定。曾处于 {incident.word} 状态 {lasted}（{incident.rule}），重启 {incident.restarts} 次{flaps_zh}。"
        )
    return {"kind": "resolve", "severity": "page", "incident": ",".join(names), "en": "\n".join(en), "zh": "\n".join(zh)}


def _circuit(target: str, decision: Decision, incident: Incident | None) -> dict[str, Any]:
    name = incident.id if incident else ""
    en = f"{target}: automatic restarts are stopped ({decision.reason}). Fix the cause, then run: health_check.py reset --reason WHY"
    zh = f"{target}：不再自动重启（{decision.reason}）。请排除原因后执行：health_check.py reset --reason 原因"
    return {"kind": "circuit", "severity": "page", "incident": name, "en": en, "zh": zh}


def _person(target: str, decision: Decision, incident: Incident | None) -> dict[str, Any]:
    en = f"{target}: {decision.reason}. Runbook: {RUNBOOK}#corrupt"
    zh = f"{target}：自动处理的每一步都已尝试，仍未恢复（{decision.reason}），需要人工处理。手册：{RUNBOOK}#corrupt"
    return {"kind": "person", "severity": "page", "incident": incident.id if incident else "", "en": en, "zh": zh}


def _reminder(incident: Incident | None, now: float) -> dict[str, Any] | None:
    """None for a flapping service, which would cause a reminder at every flap."""
    if incident is None or incident.recovered_at is not None or incident.flaps:
        return None
    n = incident.reminders
    due_s = REMIND_AFTER_S[n] if n < len(REMIND_AFTER_S) else REMIND_EVERY_S * (n - len(REMIND_AFTER_S) + 1)
    if now - incident.opened_at < due_s:
        return None
    lasts = _duration(now - incident.first_seen_at)
    return {
        "kind": "reminder", "severity": "page", "incident": incident.id,
        "en": f"{incident.target}: still {incident.word} after {lasts}. {incident.en}",
        "zh": f"{incident.target}：{incident.word} 已持续 {lasts}。{incident.zh}",
    }  # fmt: skip


def _warning(item: Mapping[str, Any]) -> dict[str, Any]:
    if item["mean"] is None:  # a fact about the checker, without a reading
        now_en = now_zh = ""
    else:
        now_en, now_zh = f" Now {item['mean']}.", f"当前 {item['mean']}。"
    state_en, state_zh = ("Warning", "警告") if item["began"] else ("Resolved", "警告解除")
    return {
        "kind": "fire" if item["began"] else "resolve", "severity": "warn", "incident": f"warning-{item['name']}",
        "en": f"{state_en}: {item['en']}{now_en}", "zh": f"{state_zh}：{item['zh']}{now_zh}",
    }  # fmt: skip


# The outbox.


def queue(store: Store, messages: list[dict[str, Any]], settings: Settings, now: float) -> None:
    """Adds one row per message and channel. Call inside the run's transaction."""
    for message in messages:
        at = now if message["severity"] == "page" else after_quiet_hours(settings, now)
        for channel in channels.configured(settings):
            store.execute(
                "INSERT INTO outbox (made_at, channel, kind, incident, severity, message, next_at) VALUES (?, ?, ?, ?, ?, json(?), ?)",
                now, channel.name, message["kind"], message["incident"], message["severity"],
                json.dumps(message, ensure_ascii=False), at,
            )  # fmt: skip


def deliver(store: Store, settings: Settings, hold: holds.Holds, now: float) -> None:
    """Sends what is due: channels in parallel, messages of a channel in order. Raises sqlite3.Error only."""
    if holds.in_force(hold, "silence", now) or holds.in_force(hold, "maintenance", now):
        return
    pending: list[tuple[list[list[dict[str, Any]]], Deadline[list[str]]]] = []
    for channel in channels.configured(settings):
        due = store.rows(
            "SELECT * FROM outbox WHERE channel = ? AND sent_at IS NULL AND next_at <= ? AND made_at > ? ORDER BY id",
            channel.name, now, now - GIVE_UP_AFTER_S,
        )  # fmt: skip
        allowed = settings.alerts_per_hour - _sent_last_hour(store, channel.name, now)
        if due and allowed > 0:
            batches = [due] if len(due) > DIGEST_ABOVE else [[row] for row in due[:allowed]]
            sending: Deadline[list[str]] = Deadline(partial(_send_all, channel, batches, settings), SEND_LIMIT_S, [])
            pending.append((batches, sending))
    for batches, sending in pending:
        outcomes = sending.result()
        with store.transaction():
            for number, batch in enumerate(batches):
                error = outcomes[number] if number < len(outcomes) else "not sent before the deadline"
                _record_outcome(store, batch, redact(error, settings), now)


def _send_all(channel: channels.Channel, batches: list[list[dict[str, Any]]], settings: Settings) -> list[str]:
    """One error per batch, empty if it was accepted. Stops at the first failure to keep the order."""
    outcomes: list[str] = []
    for batch in batches:
        severity = "page" if any(row["severity"] == "page" for row in batch) else "warn"
        text = redact(text_of([row["message"] for row in batch], settings.alert_language), settings)
        outcomes.append(channel.send(text, severity, [row["message"] for row in batch]))
        if outcomes[-1]:
            break
    return outcomes


def text_of(messages: list[Mapping[str, Any]], language: str) -> str:
    lines = []
    for message in messages:
        lines += [message["en"]] if language != "zh" else []
        lines += [message["zh"]] if language != "en" else []
    return "\n".join(lines)


def _record_outcome(store: Store, batch: list[dict[str, Any]], error: str, now: float) -> None:
    for row in batch:
        if not error:
            store.execute("UPDATE outbox SET sent_at = ?, tries = tries + 1, error = NULL WHERE id = ?", now, row["id"])
        else:
            wait_s = min(30.0 * 2 ** min(row["tries"], 7), 3600.0)
            store.execute(
                "UPDATE outbox SET tries = tries + 1, next_at = ?, error = ? WHERE id = ?", now + wait_s, error[:300], row["id"]
            )


def _sent_last_hour(store: Store, channel: str, now: float) -> int:
    row = store.execute("SELECT COUNT(*) FROM outbox WHERE channel = ? AND sent_at > ?", channel, now - 3600).fetchone()
    return int(row[0])


def after_quiet_hours(settings: Settings, now: float) -> float:
    """`now`, or the end of the quiet hours if `now` is within them."""
    if not settings.quiet_hours:
        return now
    zone = ZoneInfo(settings.timezone) if settings.timezone else None
    local = datetime.fromtimestamp(now, zone)
    begin, end = (clock_time.fromisoformat(part) for part in settings.quiet_hours.split("-"))
    t = local.time()
    quiet = begin <= t < end if begin < end else t >= begin or t < end
    if not quiet:
        return now
    wake = local.replace(hour=end.hour, minute=end.minute, second=0, microsecond=0)
    return (wake if wake > local else wake + timedelta(days=1)).timestamp()


def ping(settings: Settings, report: Mapping[str, Any]) -> str:
    """Dead man's switch: an external service alerts when the pings stop. Empty if it was accepted, otherwise why not."""
    if settings.ping_url is None:
        return ""
    good = report["service_healthy"] in (True, None)  # a checker that cannot judge is still alive
    text = "\n".join([report["verdict"], *report["reasons"]])
    url, by_query = ping_address(settings.ping_url.get_secret_value(), good, text)
    body = None if by_query else text.encode()[:10000]
    reply = exchange(url, PING_LIMIT_S, "GET" if by_query else "POST", body, connect_s=3.0)
    accepted = reply.outcome == "answered" and 200 <= reply.status < 300
    return "" if accepted else f"the outbound ping was not accepted: {reply.detail or f'HTTP {reply.status}'}"


def ping_address(url: str, good: bool, text: str) -> tuple[str, bool]:
    """(URL, whether the state is in its query): Healthchecks expects `<url>/fail`, Uptime Kuma `?status=down`."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "status" in query:
        query |= {"status": "up" if good else "down", "msg": text[:200]}
        return urlunsplit(parts._replace(query=urlencode(query))), True
    path = parts.path.rstrip("/") + ("" if good else "/fail")
    return urlunsplit(parts._replace(path=path)), False


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
