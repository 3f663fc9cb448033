"""What the API says of itself, from /health or from its heartbeat file, made safe: whoever answers may send anything.

Every number is finite, not negative and within MOST; every text is short and can be encoded. What is not is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from monitor.judge.evidence import CardEvent, Corruption, Identity, Outcomes, SelfReport

MOST = 2.0**53
MAX_REASONS = 32
MAX_EVENTS = 64  # the newest come first
MAX_ROWS = 32  # classes of rows in `pace`


def parse(body: Mapping[str, Any]) -> SelfReport:
    """Never raises, whatever JSON object is given."""
    return SelfReport(
        identity=_identity(body.get("identity")),
        loading_still_s=number(body.get("loading_still_s")),
        outcomes=_outcomes(body.get("outcomes")),
        failed_callers=_callers(body.get("failed_callers")),
        pace=_pace(body.get("pace")),
        corrupt=_corrupt(body.get("corrupt")),
        card_events=_card_events(body.get("card_events")),
    )


def number(value: object) -> float | None:
    """A finite number from 0 to MOST, None otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST or not math.isfinite(value):
        return None
    return float(value)


def count(value: object) -> int | None:
    """A whole number from 0 to MOST, None otherwise."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST else None


def text(value: object, limit: int = 200) -> str:
    """At most `limit` characters, without surrogates, which no file could store; empty if it is no text."""
    return value[:limit].encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _identity(raw: object) -> Identity | None:
    given = mapping(raw)
    pid, start_time, boot_id = count(given.get("pid")), count(given.get("start_time")), text(given.get("boot_id"), 64)
    if not pid or start_time is None or not boot_id:
        return None
    return Identity(pid, start_time, boot_id, text(given.get("version"), 40))


def _outcomes(raw: object) -> Outcomes | None:
    """None unless every count is one: a share of half a table would be wrong."""
    if not isinstance(raw, dict):
        return None
    answered = [count(value) for value in mapping(raw.get("answered")).values()]
    failed = {text(reason, 40) or "unnamed": count(value) for reason, value in mapping(raw.get("failed")).items()}
    known = {reason: value for reason, value in failed.items() if value is not None}
    if None in answered or len(known) < len(failed) or len(failed) > MAX_REASONS:
        return None
    return Outcomes(sum(value for value in answered if value is not None), known)


def _callers(raw: object) -> dict[str, int]:
    counted = {text(reason, 40): count(number) for reason, number in list(mapping(raw).items())[:MAX_REASONS]}
    return {reason: number for reason, number in counted.items() if number is not None}


def _pace(raw: object) -> dict[str, Any] | None:
    if not isinstance(raw, dict):
        return None
    decode = {text(rows, 16): _pair(pair) for rows, pair in list(mapping(raw.get("decode")).items())[:MAX_ROWS]}
    pace: dict[str, Any] = {"decode": {rows: pair for rows, pair in decode.items() if rows and pair}}
    for name in ("prefill", "vision"):
        pair = _pair(raw.get(name))
        if pair:
            pace[name] = pair
    return pace


def _pair(raw: object) -> list[float] | None:
    """[how many, seconds]"""
    if not isinstance(raw, list) or len(raw) != 2:
        return None
    many, seconds = number(raw[0]), number(raw[1])
    return None if many is None or seconds is None else [many, seconds]


def _corrupt(raw: object) -> Corruption | None:
    if not isinstance(raw, dict):
        return None
    return Corruption(
        count(raw.get("nonfinite_total")) or 0, count(raw.get("nonfinite_recent")) or 0, text(raw.get("fingerprint"), 16),
        text(raw.get("fingerprint_stage"), 80), number(raw.get("fingerprint_age_s")), text(raw.get("reference"), 16),
        text(raw.get("reference_detail"), 300),
    )  # fmt: skip


def _card_events(raw: object) -> tuple[CardEvent, ...]:
    events = []
    for entry in raw[:MAX_EVENTS] if isinstance(raw, list) else ():
        given = mapping(entry)
        code, age_s = count(given.get("code")), number(given.get("age_s"))
        kind = text(given.get("kind"), 8)
        if kind in ("xid", "ecc") and code is not None and age_s is not None:
            events.append(CardEvent(kind, code, count(given.get("card")) or 0, age_s))
    return tuple(events)
