"""One run for a service of several replicas: each is checked and cured by a run of its own, side by side, then the whole.

A replica's run is that of a single API (`check.py`), with its own log folder, store and limits. What belongs to all is the run of
the whole: nginx, the page, the machine, and one verdict. Operators' requests and holds are in the store of the whole, and are
passed on from here.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

from monitor import check
from monitor.act import front
from monitor.act.lock import Lock
from monitor.check import Outcome
from monitor.judge import holds
from monitor.judge.evidence import Replica
from monitor.judge.replica_rules import out_of_service
from monitor.observe.observe import now as current_moment
from monitor.store.store import Store
from monitor.tell.log import warn
from settings import Settings

MARGIN_S = 10.0  # of the budget, for the run of the whole
HOLDS = ("pause", "resume", "silence", "maintenance")
CARRIED_OUT = ("restart", "drain")  # by the replicas alone; `probe` and `reset` are the whole's too


class SharedLock(Lock):
    """The lock of the run, whose deadline no replica brings forward."""

    def __init__(self, lock: Lock | None) -> None:
        self._shared = lock
        self._one_at_a_time = threading.Lock()

    def extend(self, limit_s: float, what: str) -> None:
        with self._one_at_a_time:
            if self._shared is not None and limit_s > self._shared.left_s:
                self._shared.extend(limit_s, what)


def run(
    settings: Settings, rng: random.Random, lock: Lock | None = None, clock: Callable[[], Any] = current_moment, act: bool = True
) -> Outcome:
    """As `check.run`, for all replicas and the whole."""
    numbers = range(settings.replica_count)
    parts = {number: settings.for_replica(number) for number in numbers}
    for one in parts.values():
        with contextlib.suppress(OSError):  # of a full disk, with which every store can deal
            one.log_dir.mkdir(parents=True, exist_ok=True)
    passed_on = _pass_on(settings, parts, clock().wall) if act else {}
    outcomes: dict[int, Outcome | str] = {}
    shared = SharedLock(lock)

    def one_run(number: int) -> None:
        try:
            outcomes[number] = check.run(parts[number], rng, shared, clock, act)
        except Exception as error:
            outcomes[number] = f"its run failed: {type(error).__name__}: {error}"
            warn(f"replica {number}: {outcomes[number]}")

    threads = [threading.Thread(target=one_run, args=(number,), name=f"replica-{number}", daemon=True) for number in numbers]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    for thread in threads:
        while thread.is_alive() and _left_s(lock, settings, began) > MARGIN_S:
            thread.join(0.1)
    found = [_replica(parts[number], outcomes.get(number, "its run takes longer than GLM_CHECK_BUDGET_S")) for number in numbers]
    if act:
        _answer_requests(settings, parts, passed_on)
        front.take_out(settings, out_of_service(found))
    return check.run(settings, rng, lock, clock, act, replicas=found)


def _left_s(lock: Lock | None, settings: Settings, began: float) -> float:
    return lock.left_s if lock is not None else settings.check_budget_s - (time.monotonic() - began)


def _replica(settings: Settings, outcome: Outcome | str) -> Replica:
    number = settings.replica or 0
    if isinstance(outcome, str):
        return Replica(
            number, settings.api_port, settings.gpus, "unknown", "not_judged", f"The checker could not judge it: {outcome}.",
            f"检查程序无法判断：{outcome}。",
        )  # fmt: skip
    target = outcome.report["targets"]["api"]
    return Replica(
        number, settings.api_port, settings.gpus, target["word"], target["rule"], target["en"], target["zh"], target["since"],
        target["incident"], target["restarts_last_day"], target["circuit_open"], target["decision"]["kind"],
    )  # fmt: skip


def _pass_on(settings: Settings, parts: dict[int, Settings], wall: float) -> dict[int, list[tuple[int, int]]]:
    """Puts the holds, and the requests for replicas, into their stores: {request of the whole: [(replica, its request)]}."""
    passed_on: dict[int, list[tuple[int, int]]] = {}
    try:
        with contextlib.closing(Store.open(settings.log_dir)) as store, store.transaction():
            in_force = dict(store.get("hold", {}))
            for request in store.rows("SELECT * FROM requests WHERE state = 'waiting' ORDER BY id"):
                kind, target, arguments = request["kind"], request["target"] or "", request["arguments"] or {}
                if kind in HOLDS:
                    with contextlib.suppress(ValueError, TypeError):
                        holds.apply(in_force, kind, arguments, wall)
                    continue
                numbers = _meant(target, parts)
                if not numbers:
                    continue
                taken = [(number, _ask(parts[number], request)) for number in numbers]
                if kind in CARRIED_OUT or target.startswith("api/"):
                    passed_on[request["id"]] = taken
                    store.execute("UPDATE requests SET state = 'running', taken_at = ? WHERE id = ?", wall, request["id"])
        for one in parts.values():
            with contextlib.closing(Store.open(one.log_dir)) as store, store.transaction():
                if store.get("hold", {}) != in_force:
                    store.put("hold", in_force)
    except (sqlite3.Error, OSError, ValueError, TypeError, AttributeError) as error:
        warn(f"holds and requests could not be passed on to the replicas: {error}")
    return passed_on


def _meant(target: str, parts: dict[int, Settings]) -> list[int]:
    """The replicas that a request is for; none if it is for something else, or for one that does not exist."""
    if target in ("", "all", "api"):
        return list(parts)
    name, _, number = target.partition("/")
    return [int(number)] if name == "api" and number.isdigit() and int(number) in parts else []


def _ask(one: Settings, request: dict[str, Any]) -> int:
    with contextlib.closing(Store.open(one.log_dir)) as store, store.transaction():
        return store.add_request(request["made_at"], request["actor"], request["kind"], "api", request["arguments"] or {})


def _answer_requests(settings: Settings, parts: dict[int, Settings], passed_on: dict[int, list[tuple[int, int]]]) -> None:
    """Ends the requests that were passed on, with what became of them, and audits that."""
    if not passed_on:
        return
    try:
        with contextlib.closing(Store.open(settings.log_dir)) as store, store.transaction():
            for number, taken in passed_on.items():
                states, texts = [], []
                for replica, theirs in taken:
                    state, outcome = _outcome(parts[replica], theirs)
                    states.append(state)
                    texts.append(f"replica {replica}: {outcome}")
                state = next((state for state in ("failed", "refused") if state in states), "done")
                row = store.rows("SELECT * FROM requests WHERE id = ?", number)[0]
                store.end_request(number, time.time(), state, "; ".join(texts))
                store.add_action(time.time(), row["target"], row["kind"], row["actor"], state, "; ".join(texts))
    except (sqlite3.Error, OSError) as error:
        warn(f"what became of the requests could not be written: {error}")


def _outcome(one: Settings, number: int) -> tuple[str, str]:
    with contextlib.closing(Store.read_only(one.log_dir)) as store:
        rows = store.rows("SELECT state, outcome FROM requests WHERE id = ?", number)
    if not rows or rows[0]["state"] not in ("done", "refused", "failed"):
        return "failed", "not carried out in this run"
    return rows[0]["state"], rows[0]["outcome"] or ""
