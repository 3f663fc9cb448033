"""The scheduled nightly restart: off by default, in a quiet hour, skipped with a reason if busy or not needed."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

from monitor.act.restart import Restarter
from monitor.judge.evidence import Observation
from monitor.judge.limiter import Decision
from monitor.judge.verdict import Verdict
from monitor.store.state import CheckerState
from monitor.store.store import Store
from settings import Settings

DEFAULT_HOUR = 4
NEEDED_HOURS = 24
YOUNG_S = 20 * 3600.0
GROWN = 1.2  # resident memory, relative to the first day


def run(
    settings: Settings, store: Store, state: CheckerState, restarter: Restarter, verdicts: dict[str, Verdict], observation: Observation,
    now: float,
) -> str:  # fmt: skip
    """Restarts at most once a day, in the chosen hour. Returns the outcome; empty outside that hour."""
    if settings.nightly_restart == "off" or observation.api.process.state != "runs":
        return ""
    zone = ZoneInfo(settings.timezone) if settings.timezone else None
    local = datetime.fromtimestamp(now, zone)
    hour = quiet_hour(store, settings, now)
    day = local.date().isoformat()
    if local.hour != hour or state.last.get("nightly", "").startswith(day):
        return ""
    reason = why_skip(verdicts["api"], observation, store, now)
    last_chance = local.minute >= 50
    if reason == "busy" and not last_chance:
        return ""  # the hour is not over
    state.last["nightly"] = f"{day} {reason or 'restarted'}"
    with store.transaction():
        state.save(store)
        if reason:
            store.add_action(now, "api", "nightly", "checker", "skipped", reason)
    if reason:
        return reason
    return restarter.restart("api", verdicts["api"], Decision("restart", "scheduled, nightly"), "nightly") or "restarted"


def quiet_hour(store: Store, settings: Settings, now: float) -> int:
    """The configured hour, or the hour with the least pending work in the last two weeks; DEFAULT_HOUR without a day of data."""
    if settings.nightly_restart != "auto":
        return int(settings.nightly_restart)
    zone = ZoneInfo(settings.timezone) if settings.timezone else None
    sums: dict[int, list[float]] = {}
    for row in store.rollups("hour", now - 14 * 86400):
        total, count, _ = (row["sums"] or {}).get("pending", (0.0, 0, 0.0))
        if count:
            sums.setdefault(datetime.fromtimestamp(row["start"], zone).hour, []).append(total / count)
    if len(sums) < NEEDED_HOURS:
        return DEFAULT_HOUR
    return min(sums, key=lambda hour: (sum(sums[hour]) / len(sums[hour]), abs(hour - DEFAULT_HOUR)))


def why_skip(verdict: Verdict, observation: Observation, store: Store, now: float) -> str:
    health = observation.api.last or observation.api.first
    if verdict.word != "healthy" or health.pending:
        return "busy" if verdict.serving else f"not healthy: {verdict.word}"
    age_s = observation.api.process.age_s
    if age_s is not None and age_s < YOUNG_S:
        return f"not needed: the process is only {age_s / 3600:.1f} h old"
    first, latest = _memory_of(store, now - (age_s or 0)), (observation.machine.get("process") or {}).get("rss_mib")
    if first and latest and latest < GROWN * first:
        return f"not needed: memory grew from {first:.0f} to {latest:.0f} MiB only"
    return ""


def _memory_of(store: Store, started_at: float) -> float | None:
    for row in store.rollups("hour", started_at + 3600):
        total, count, _ = (row["sums"] or {}).get("api_rss_mib", (0.0, 0, 0.0))
        if count:
            return total / count
    return None
