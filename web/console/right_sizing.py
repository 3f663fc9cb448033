"""Advice on the size of the instance, from the last week: too large, too small, busy and quiet hours. Pure functions.

Needs at least a day of data. Each piece of advice states the figures that it is based on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any

WEEK_S = 7 * 86400
ENOUGH_HOURS = 24
QUIET_SHARE = 0.25  # an hour of the day is quiet below this share of the busiest hour
MEMORY_TIGHT, MEMORY_LOOSE = 0.92, 0.5
LOAD_LOW, LOAD_HIGH = 15.0, 70.0
WAITING_SHARE = 0.05
CARDS_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # common sizes of rented GPUs
HEADROOM = 1.2  # of the peak, on a smaller card


@dataclass(frozen=True)
class Advice:
    """`key`: of a sentence in `web.i18n`; `values`: for its placeholders."""

    key: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class Week:
    """Readings of the hours that were checked; None without a reading. Loads are in percent."""

    hours: int
    gpu_load: float | None
    gpu_peak_mib: float | None
    memory_peak_percent: float | None
    cpu_load: float | None
    waiting_share: float  # of the hours in which more requests than `slots` were pending
    kv_peak_tokens: float | None  # most tokens in the KV cache within a minute
    at_once: float | None  # requests; no more in all but WAITING_SHARE of the hours
    by_hour: Mapping[int, float]  # hour of the day -> mean load


def summarize_week(hours: Sequence[Mapping[str, Any]], now: float, slots: int, zone: tzinfo | None) -> Week:
    """From hourly roll-ups. `zone`: of the hours of the day."""
    rows = [row for row in hours if row["start"] >= now - WEEK_S]
    load_name = "gpu_load" if any(_count(row, "gpu_load") for row in rows) else "cpu_percent"
    loads: dict[int, list[float]] = {}
    for row in rows:
        if _count(row, load_name):
            loads.setdefault(datetime.fromtimestamp(row["start"], zone).hour, []).append(_mean(row, load_name))
    waiting = [row for row in rows if _count(row, "pending") and _max(row, "pending") > slots]
    return Week(
        hours=len(rows),
        gpu_load=_overall_mean(rows, "gpu_load"),
        gpu_peak_mib=max((_max(row, "gpu_memory_used") for row in rows if _count(row, "gpu_memory_used")), default=None),
        memory_peak_percent=max(
            (_max(row, "memory_used_percent") for row in rows if _count(row, "memory_used_percent")), default=None
        ),
        cpu_load=_overall_mean(rows, "cpu_percent"),
        waiting_share=len(waiting) / len(rows) if rows else 0.0,
        kv_peak_tokens=max((_max(row, "kv_peak_tokens") for row in rows if _count(row, "kv_peak_tokens")), default=None),
        at_once=_most_in_nearly_all([_max(row, "pending") for row in rows if _count(row, "pending")]),
        by_hour={hour: sum(values) / len(values) for hour, values in sorted(loads.items())},
    )


def advise(week: Week, gpu_total_mib: float | None, classes: Sequence[Mapping[str, Any]] = (), weights: str = "") -> list[Advice]:
    """`classes`: `card_classes` of GET /info, what each class of card would serve of this model; `weights`: the format in use."""
    if week.hours < ENOUGH_HOURS:
        return [Advice("size.too_early", {"hours": week.hours, "enough": ENOUGH_HOURS})]
    advice = []
    if gpu_total_mib and week.gpu_peak_mib is not None:
        advice.append(_memory_advice(week.gpu_peak_mib, gpu_total_mib))
    elif week.memory_peak_percent is not None:
        advice.append(Advice("size.no_gpu", {"memory": f"{week.memory_peak_percent:.0f}"}))
    advice += _class_advice(week, classes, weights)
    load = week.gpu_load if week.gpu_load is not None else week.cpu_load
    if load is not None:
        key = "size.idle" if load < LOAD_LOW else "size.loaded" if load > LOAD_HIGH else "size.load_fits"
        advice.append(Advice(key, {"load": f"{load:.0f}"}))
    if week.waiting_share > WAITING_SHARE:
        advice.append(Advice("size.waiting", {"share": f"{100 * week.waiting_share:.0f}"}))
    quiet, busiest = quiet_hours(week.by_hour), busiest_hour(week.by_hour)
    if busiest is not None:
        advice.append(Advice("size.busiest", {"hour": f"{busiest:02d}:00"}))
    if quiet:
        first, last = quiet
        advice.append(Advice("size.quiet", {"first": f"{first:02d}:00", "last": f"{(last + 1) % 24:02d}:00"}))
    return advice


def _memory_advice(peak_mib: float, total_mib: float) -> Advice:
    values = {"peak": f"{peak_mib / 1024:.1f}", "total": f"{total_mib / 1024:.0f}"}
    share = peak_mib / total_mib
    if share > MEMORY_TIGHT:
        return Advice("size.memory_tight", values)
    smaller = next((size for size in CARDS_GIB if size * 1024 >= peak_mib * HEADROOM), None)
    if share < MEMORY_LOOSE and smaller is not None and smaller * 1024 < total_mib * 0.9:
        return Advice("size.memory_loose", {**values, "smaller": smaller})
    return Advice("size.memory_fits", values)


def _class_advice(week: Week, classes: Sequence[Mapping[str, Any]], weights: str) -> list[Advice]:
    """The smallest class whose plan holds what the week needed, and the smallest that does it with the weights in use."""
    if week.kv_peak_tokens is None or week.at_once is None or not classes:
        return []
    tokens, requests = math.ceil(HEADROOM * week.kv_peak_tokens), math.ceil(week.at_once)
    needs: dict[str, object] = {"peak": f"{week.kv_peak_tokens:,.0f}", "tokens": f"{tokens:,}", "requests": requests}
    enough = [each for each in classes if each["kv_tokens"] >= tokens and each["slots"] >= requests]
    if not enough:
        return [Advice("size.class_none", {**needs, "largest": classes[-1]["gib"]})]
    found = [Advice("size.class", {**needs, **_served_by(enough[0])})]
    same = next((each for each in enough if each["weights"] == weights), None)
    if same is not None and same is not enough[0]:
        found.append(Advice("size.class_same", _served_by(same)))
    return found


def _served_by(each: Mapping[str, Any]) -> dict[str, object]:
    return {"gib": each["gib"], "weights": each["weights"], "kv": f"{each['kv_tokens']:,}", "slots": each["slots"]}


def _most_in_nearly_all(values: Sequence[float]) -> float | None:
    return sorted(values)[math.ceil((1 - WAITING_SHARE) * len(values)) - 1] if values else None


def busiest_hour(by_hour: Mapping[int, float]) -> int | None:
    return max(by_hour, key=lambda hour: by_hour[hour], default=None)


def quiet_hours(by_hour: Mapping[int, float]) -> tuple[int, int] | None:
    """(first, last) of the longest run of quiet hours of the day, which may span midnight; None if there is none."""
    highest = max(by_hour.values(), default=0.0)
    if highest <= 0 or len(by_hour) < 24:
        return None
    quiet = [by_hour[hour] < QUIET_SHARE * highest for hour in range(24)]
    best: tuple[int, int] | None = None
    length = 0
    for first in range(24):
        run = next((n for n in range(24) if not quiet[(first + n) % 24]), 24)
        if run > length:
            best, length = (first, (first + run - 1) % 24), run
    return best if length >= 2 else None


def _count(row: Mapping[str, Any], name: str) -> int:
    return int(((row["sums"] or {}).get(name) or (0, 0, 0))[1])


def _mean(row: Mapping[str, Any], name: str) -> float:
    total, count, _ = row["sums"][name]
    return float(total) / count


def _max(row: Mapping[str, Any], name: str) -> float:
    return float(row["sums"][name][2])


def _overall_mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    sums = [row["sums"][name] for row in rows if _count(row, name)]
    count = sum(entry[1] for entry in sums)
    return float(sum(entry[0] for entry in sums) / count) if count else None
