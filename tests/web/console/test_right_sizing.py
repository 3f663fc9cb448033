"""Advice on the size of the instance, from a week of hourly roll-ups."""

from __future__ import annotations

from datetime import UTC
from typing import Any

import pytest

from web.console.right_sizing import advise, busiest_hour, quiet_hours, summarize_week

NOW = 1_800_000_000.0 // 86400 * 86400  # midnight, UTC
GIB = 1024.0


def hours(count: int, load_at: Any = lambda hour: 40.0, peak_gib: float = 20.0, pending: float = 0, **more: float) -> list[dict]:
    rows = []
    for n in range(count):
        start = NOW - (n + 1) * 3600
        values = {"gpu_load": load_at(int(start // 3600 % 24)), "gpu_memory_used": peak_gib * GIB, "pending": pending, **more}
        rows.append({"start": start, "words": {}, "sums": {name: [v * 60, 60, v] for name, v in values.items()}})
    return rows


def keys(rows: list[dict], total_gib: float | None = 48, slots: int = 4) -> list[str]:
    return [each.key for each in advise(summarize_week(rows, NOW, slots, UTC), total_gib and total_gib * GIB)]


def test_a_few_hours_are_not_enough_for_advice() -> None:
    (only,) = advise(summarize_week(hours(23), NOW, 4, UTC), 48 * GIB)

    assert (only.key, only.values["hours"]) == ("size.too_early", 23)


def test_a_half_empty_card_leads_to_advice_for_a_smaller_one() -> None:
    found = {each.key: each.values for each in advise(summarize_week(hours(48, peak_gib=18), NOW, 4, UTC), 80 * GIB)}

    assert found["size.memory_loose"] == {"peak": "18.0", "total": "80", "smaller": 24}


@pytest.mark.parametrize(("peak", "key"), [(47, "size.memory_tight"), (30, "size.memory_fits"), (10, "size.memory_loose")])
def test_memory_is_judged_by_its_peak(peak: float, key: str) -> None:
    assert key in keys(hours(48, peak_gib=peak))


@pytest.mark.parametrize(("load", "key"), [(5, "size.idle"), (40, "size.load_fits"), (90, "size.loaded")])
def test_load_is_judged_by_its_mean(load: float, key: str) -> None:
    assert key in keys(hours(48, load_at=lambda hour: load))


def test_waiting_counts_only_beyond_the_slots() -> None:
    assert "size.waiting" not in keys(hours(48, pending=4), slots=4)
    assert "size.waiting" in keys(hours(48, pending=5), slots=4)


def test_without_a_gpu_the_machine_s_own_memory_counts() -> None:
    rows = [
        {"start": NOW - n * 3600, "words": {}, "sums": {"cpu_percent": [600.0, 60, 30], "memory_used_percent": [6000, 60, 55]}}
        for n in range(1, 30)
    ]

    assert keys(rows, total_gib=None) == ["size.no_gpu", "size.idle", "size.busiest"]


def test_quiet_hours_are_found_over_midnight() -> None:
    week = summarize_week(hours(168, load_at=lambda hour: 60.0 if 8 <= hour < 22 else 3.0), NOW, 4, UTC)

    assert quiet_hours(week.by_hour) == (22, 7)
    assert busiest_hour(week.by_hour) in range(8, 22)


def test_an_even_load_has_no_quiet_hours() -> None:
    assert quiet_hours(summarize_week(hours(168), NOW, 4, UTC).by_hour) is None


def test_hours_before_the_week_do_not_count() -> None:
    assert summarize_week(hours(400), NOW, 4, UTC).hours == 168


CLASSES = [
    {"gib": 12, "weights": "nf4", "kv_tokens": 40_000, "slots": 16}, {"gib": 16, "weights": "fp8", "kv_tokens": 60_000, "slots": 16},
    {"gib": 24, "weights": "bf16", "kv_tokens": 70_000, "slots": 32}, {"gib": 80, "weights": "bf16", "kv_tokens": 900_000, "slots": 64},
]  # fmt: skip


def classes_named(rows: list[dict], weights: str = "bf16") -> list[tuple[str, object]]:
    found = advise(summarize_week(rows, NOW, 4, UTC), 80 * GIB, CLASSES, weights)
    return [(each.key, each.values.get("gib")) for each in found if each.key.startswith("size.class")]


@pytest.mark.parametrize(
    ("tokens", "at_once", "named"),
    [
        (10_000, 4, [("size.class", 12), ("size.class_same", 24)]),
        (40_000, 4, [("size.class", 16), ("size.class_same", 24)]),  # with a fifth to spare
        (10_000, 20, [("size.class", 24)]),
        (800_000, 4, [("size.class_none", None)]),
    ],
)
def test_the_class_of_card_is_the_smallest_whose_plan_holds_the_week(tokens: float, at_once: float, named: list) -> None:
    assert classes_named(hours(48, pending=at_once, kv_peak_tokens=tokens)) == named


def test_one_busy_hour_in_a_hundred_needs_no_larger_card() -> None:
    rows = hours(100, pending=4, kv_peak_tokens=10_000.0)
    rows[50]["sums"]["pending"] = [60 * 50, 60, 50]

    assert classes_named(rows)[0] == ("size.class", 12)


def test_without_a_plan_or_the_reading_no_class_is_named() -> None:
    assert classes_named(hours(48, pending=4)) == []
    assert advise(summarize_week(hours(48, pending=4, kv_peak_tokens=1.0), NOW, 4, UTC), None) != []
