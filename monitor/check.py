"""One run of the checker, in order: observe, judge, store, report, act, alert.

Every decision is stored before it is carried out, so a run that is killed halfway loses no incident and no restart count.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from monitor.act import interrupted_restart, nightly, operator_requests, stop_marks
from monitor.act.cure import Cure
from monitor.act.lock import Lock
from monitor.act.restart import Restarter
from monitor.judge import accuracy, engine_rules, history, holds, ladder, limiter, pace, thresholds
from monitor.judge.api_rules import judge_api
from monitor.judge.engine_rules import judge_behind
from monitor.judge.evidence import Observation, Replica
from monitor.judge.front_rules import judge_front
from monitor.judge.history import Change
from monitor.judge.limiter import Allowance, Decision
from monitor.judge.page_rules import judge_page
from monitor.judge.readings import OF_THE_API, SLOWER, settings_thresholds, values_of
from monitor.judge.replica_rules import judge_replicas
from monitor.judge.verdict import Limits, Verdict
from monitor.observe import machine, unit
from monitor.observe.observe import ProbePlan, draining_of, observe
from monitor.observe.observe import now as current_moment
from monitor.observe.question import PICTURE_KINDS
from monitor.store import baseline
from monitor.store.state import PARTS, WITH_FRONT, CheckerState
from monitor.store.store import Store
from monitor.tell import alerts, exports, notices, report
from monitor.tell.log import warn
from settings import Settings

UNREADABLE = (sqlite3.Error, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
SCRIPT_EVERY_RUNS = 2
ASK_AT_LEAST_EVERY_S = 180.0  # answers to users are not verified, so they replace the probe for a limited time only

FinerRule = Callable[[Observation, Settings, CheckerState], Verdict | None]
FINER_RULES: tuple[FinerRule, ...] = ()  # compare with the API's own past, which only a state between runs knows


@dataclass
class Outcome:
    """The result of a run."""

    report: dict[str, Any]
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)


def run(
    settings: Settings,
    rng: random.Random,
    lock: Lock | None = None,
    clock: Callable[[], Any] = current_moment,
    act: bool = True,
    replicas: Sequence[Replica] = (),
) -> Outcome:
    """`act` False observes and records only: no restarts, no operators' requests.

    `replicas`: what their own runs have just found, in the run of a service of several (`monitor/replicas.py`).
    """
    store = Store.open_for_run(settings.log_dir)
    try:
        return _run(store, settings, rng, lock, clock, act, replicas)
    except UNREADABLE as error:
        # Values that make no sense, in a file that SQLite finds in order. A fault of the checker itself is raised again.
        problem = f"{type(error).__name__}: {error}"
        if not store.rebuild(problem):
            raise
        warn(f"the run is repeated with a new store ({problem})")
        return _run(store, settings, rng, lock, clock, act, replicas)


def _run(
    store: Store, settings: Settings, rng: random.Random, lock: Lock | None, clock: Callable[[], Any], act: bool, replicas: Sequence[Replica]
) -> Outcome:  # fmt: skip
    started = time.monotonic()
    moment = clock()
    state = CheckerState.load(store, moment.boot_id, WITH_FRONT if settings.replica_count > 1 else PARTS)
    if not state.accuracy.kinds:
        state.accuracy = accuracy.from_dict(baseline.read(settings.log_dir))
    if act:
        stop_marks.remove_stale(store, settings, moment.wall)
        if interrupted_restart.settle(store, state, settings, lock):
            moment = clock()
    operators = operator_requests.take(store, moment.wall) if act else []
    # Holds and resets apply to this run; restarts are made at its end.
    operator_requests.carry_out([r for r in operators if r["kind"] not in operator_requests.AT_THE_END], store, state, None, moment.wall)
    plan = _probe_plan(state, settings, moment.wall, operators)
    observation = _with_accuracy(state, observe(settings, rng, plan, moment, state.external_engine))
    observation = replace(observation, replicas=tuple(replicas))
    verdicts = judge(observation, settings, state)
    if observation.front is None:
        verdicts["api"] = _judge_pace(observation, verdicts["api"], settings, state)
    changes = _advance(state, verdicts, observation, settings)
    warnings, changed_warnings = _warn(state, observation, settings, verdicts["api"])
    noticed, changed_notices = notices.current(store, moment.wall, of_a_replica=settings.replica is not None)
    warnings, changed_warnings = warnings + noticed, changed_warnings + changed_notices
    hold = holds.why_no_restart(state.holds, moment.wall)
    decisions = _decide(state, verdicts, settings, moment.wall, hold) if act else {}
    summary = _report(observation, verdicts, decisions, state, warnings, settings, store, time.monotonic() - started)
    messages = alerts.compose(changes, changed_warnings, decisions, verdicts, state.histories, settings, moment.wall)
    messages = alerts.of_replica(messages, settings.replica)
    store = _persist(settings, store, state, summary, verdicts, changes, decisions, messages, observation)
    _publish(summary, settings, store, state)
    if act:
        restarter = Restarter(settings, store, state, observation, lock)
        cure = Cure(settings, store, state, restarter, rng, lock)
        for target, decision in decisions.items():
            cure.carry_out(target, verdicts[target], decision)
        late = [r for r in operators if r["kind"] in operator_requests.AT_THE_END]
        operator_requests.carry_out(late, store, state, restarter, moment.wall)
        nightly.run(settings, store, state, restarter, verdicts, observation, moment.wall)
        if restarter.restarted or cure.climbed:
            # Verify the cure now rather than one period later.
            store.close()
            return run(settings, rng, lock, clock, act=False, replicas=replicas)
    try:
        alerts.deliver(store, settings, state.holds, time.time())
    except sqlite3.Error as error:  # the disk filled up since the verdict was stored
        warn(f"the outbox cannot be written: {error}")
    problem = alerts.ping(settings, summary) if settings.replica is None else ""
    if problem:
        warn(problem)
    _note_own_work(store)
    store.close()
    return Outcome(summary, verdicts, decisions)


def _note_own_work(store: Store) -> None:
    """What this run costs from its readings to here, which the next run does not count as load of the machine."""
    last = store.get("last", {})
    if last.get("machine"):
        last["machine"]["own_end_s"] = machine.own_s()
        with contextlib.suppress(sqlite3.Error), store.transaction():
            store.put("last", last)


def limits_of(settings: Settings) -> Limits:
    return Limits(
        settings.check_period_s, settings.beat_limit_s, settings.stall_s, settings.start_deadline_s, settings.confirm_runs,
        settings.stable_s, settings.failure_share_limit, settings.failure_count_limit, settings.check_budget_s, settings.stop_s,
    )  # fmt: skip


def judge(observation: Observation, settings: Settings, state: CheckerState) -> dict[str, Verdict]:
    limits = limits_of(settings)
    if observation.front is not None:
        verdicts = {"api": judge_replicas(observation.replicas), "front": judge_front(observation.front, limits)}
    else:
        api = judge_behind(judge_api(observation.api, limits), observation.api, limits)
        verdicts = {"api": _judge_finer(api, observation, settings, state)}
    if observation.page is not None:
        verdicts["page"] = judge_page(observation.page, limits, observation.api)
    for target, verdict in verdicts.items():
        why = history.why_inconclusive(state.histories[target].moment, observation.moment, limits)
        if why and verdict.bad:
            # Ages that span the jump are wrong; the next run judges again.
            verdicts[target] = Verdict(
                target, "unknown", "clock_jump", f"Not judged this time: {why}.", f"本次不作判断：{why}。",
                {"would_be": verdict.word}, f"{history.CLOCK_JUMP_S:.0f} s between the two clocks",
            )  # fmt: skip
    return verdicts


def _judge_finer(verdict: Verdict, observation: Observation, settings: Settings, state: CheckerState) -> Verdict:
    """Of an API that would be healthy, the first of FINER_RULES that finds fault with it decides."""
    if verdict.word != "healthy":
        return verdict
    found = (rule(observation, settings, state) for rule in FINER_RULES)
    return next((finer for finer in found if finer is not None), verdict)


def _judge_pace(observation: Observation, verdict: Verdict, settings: Settings, state: CheckerState) -> Verdict:
    """The last rule for the API: a service that is well may be slower than it was."""
    model_key = observation.api.model_key
    recipe = settings.engine_url or (", ".join(model_key.values()) if model_key else "")
    return pace.judge(state.pace, observation, verdict, recipe if verdict.word in pace.JUDGED else "")


def _probe_plan(state: CheckerState, settings: Settings, now: float, operators: list[dict[str, Any]]) -> ProbePlan:
    last = state.last
    asked_ago_s = now - last.get("asked_at", 0)
    records: Any = last.get("records")
    requested = any(request["kind"] == "probe" for request in operators)
    unsure = any(h.incident is not None or h.seen for h in state.histories.values())
    return ProbePlan(
        question=requested or unsure or state.accuracy.suspicious or not 0 <= asked_ago_s < ASK_AT_LEAST_EVERY_S,
        script=requested or bool(last.get("script_bad")) or last.get("runs", 0) % SCRIPT_EVERY_RUNS == 0,
        oom_kills=last.get("oom_kills"),
        machine=last.get("machine"),
        traffic=state.traffic,
        unproven_runs=last.get("unproven_runs", 0),
        limits=limits_of(settings),
        accuracy=state.accuracy,
        records=records if isinstance(records, dict) else {},
        draining=draining if isinstance(draining := last.get("draining"), dict) else {},
    )


def _with_accuracy(state: CheckerState, observation: Observation) -> Observation:
    """Adds the run's answers to what is known of this model, and that to the evidence."""
    api = observation.api
    if api.answers and not api.other and api.process.port_owner != "stranger":
        known = accuracy.for_model(state.accuracy, api.model_key)
        state.accuracy = accuracy.after_answers(known, api.answers, observation.moment.wall)
    return replace(observation, api=replace(api, accuracy=accuracy.evidence_of(state.accuracy, PICTURE_KINDS)))


def _advance(state: CheckerState, verdicts: dict[str, Verdict], observation: Observation, settings: Settings) -> list[Change]:
    changes: list[Change] = []
    for target, verdict in verdicts.items():
        had = state.histories[target].incident
        state.histories[target], more = history.advance(state.histories[target], verdict, observation.moment, limits_of(settings))
        if had is not None and state.histories[target].incident is None:
            state.limiters[target] = limiter.stable(state.limiters[target])
        changes += more
    page = observation.page
    state.last = {
        "runs": state.last.get("runs", 0) + 1,
        "asked_at": observation.moment.wall if observation.asked else state.last.get("asked_at", 0),
        "script_bad": bool(page and page.script and not page.script.good and page.script.status != 404)
        or (bool(state.last.get("script_bad")) and not (page and page.script)),
        "oom_kills": observation.machine.get("oom_kills"),
        "nightly": state.last.get("nightly", ""),
        "machine": observation.machine.get("counters"),
        "unproven_runs": observation.api.unproven_runs,
        "records": observation.records,
        "draining": draining_of(observation.api, observation.moment),
        "at": observation.moment.wall,
    }
    return changes


def _warn(
    state: CheckerState, observation: Observation, settings: Settings, verdict: Verdict
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(active warnings, those that began or ended in this run). `verdict`: of the API, which explains its slowness."""
    busy_since = state.histories["api"].busy_since
    values, in_force, changed_warnings = values_of(observation, busy_since, state.pace), [], []
    kept = settings_thresholds(settings)
    if settings.replica is not None:  # the machine is judged once, by the run of the whole
        kept = [threshold for threshold in kept if threshold.name in OF_THE_API]
    for threshold in kept:
        before = state.thresholds.get(threshold.name, thresholds.ThresholdState())
        after = thresholds.update(threshold, before, values.get(threshold.name), observation.moment.wall)
        state.thresholds[threshold.name] = after
        mean = thresholds.mean_of(after)
        slower = threshold.name == verdict.rule == SLOWER
        en, zh = (verdict.en, verdict.zh) if slower else (threshold.en, threshold.zh)
        warning = {
            "name": threshold.name, "since": after.since, "mean": None if mean is None else round(mean, 1),
            "limit": threshold.raise_at, "en": en, "zh": zh,
        }  # fmt: skip
        if after.since is not None:
            in_force.append(warning)
        if (before.since is None) != (after.since is None):
            changed_warnings.append({**warning, "began": after.since is not None})
    return in_force, changed_warnings


def systemd_restarts(target: str, verdict: Verdict) -> str:
    """Why a target that systemd owns is left to it; empty if a restart is the checker's to ask for.

    What has ended or stands still systemd restarts by itself. What answers wrongly it cannot know; and the page has no watchdog.
    """
    if verdict.word != "dead" and not (target == "api" and verdict.word in ("wedged", "zombie")):
        return ""
    owner = unit.owner_of(WITH_FRONT[target])
    if not owner:
        return ""
    if unit.state_of(owner) == "failed":
        return f"systemd has given up on {owner} after too many starts: systemctl reset-failed {owner}, then start it"
    return f"systemd owns {owner}, and restarts what has ended or makes no progress"


def _is_elsewhere(target: str, verdict: Verdict, settings: Settings) -> bool:
    """Whether what would have to be restarted is an engine that somebody else has started."""
    if target != "api":
        return False
    return settings.watches_engine_itself or (verdict.part == engine_rules.PART and not settings.engine_command)


def _decide(
    state: CheckerState, verdicts: dict[str, Verdict], settings: Settings, now: float, hold: str
) -> dict[str, Decision]:
    allowance = Allowance(settings.restarts_per_hour, settings.restarts_per_day)
    decisions: dict[str, Decision] = {}
    newest = {name: target_limiter.restarts[-1] if target_limiter.restarts else None for name, target_limiter in state.limiters.items()}
    for target, verdict in verdicts.items():
        others = [at for name, at in newest.items() if name != target and at is not None]
        external = "GLM_ENGINE_URL names an engine that was not started here (GLM_ENGINE_COMMAND), so that it is never restarted" if _is_elsewhere(target, verdict, settings) else ""
        owned = systemd_restarts(target, verdict)
        climbs = ladder.applies(verdict)  # and is limited by the ladder instead of by attempts
        decision = limiter.decide(
            replace(verdict, attempts=None) if climbs else verdict, state.histories[target], state.limiters[target], allowance, now, settings.cure, hold or external or owned,
            max(others, default=None),
        )  # fmt: skip
        decision = ladder.decide(decision, verdict, state.ladder, now)
        if decision.opens:
            state.limiters[target] = limiter.opened(state.limiters[target], now, decision.reason)
        if decision.kind == "restart":
            newest[target] = now
        decisions[target] = decision
    return decisions


def overall(verdicts: dict[str, Verdict]) -> tuple[str, bool | None]:
    """One verdict for both targets, and whether users are served, which takes both the API and the page."""
    api, page, front = verdicts["api"], verdicts.get("page"), verdicts.get("front")
    serving = None if api.word == "unknown" else api.serving
    if front is not None and not front.serving and front.word != "unknown" and serving is not False:
        return front.word, False  # nobody reaches a replica
    if page is None or page.word in ("healthy", "unknown"):
        return api.word, serving
    if api.serving:
        return "degraded", serving and page.serving
    return api.word, serving


def _report(
    observation: Observation, verdicts: dict[str, Verdict], decisions: dict[str, Decision], state: CheckerState,
    warnings: list[dict[str, Any]], settings: Settings, store: Store, duration_s: float,
) -> dict[str, Any]:  # fmt: skip
    word, serving = overall(verdicts)
    # A run sees the time since the run before it, and no more than a period.
    since_s = observation.moment.wall - store.get("last", {}).get("at", 0)
    seen_s = round(since_s, 1) if 0 <= since_s < settings.check_period_s else settings.check_period_s
    targets = {}
    for target, verdict in verdicts.items():
        target_history, decision = state.histories[target], decisions.get(target, limiter.NONE)
        targets[target] = {
            **{name: getattr(verdict, name) for name in ("word", "rule", "en", "zh", "facts", "threshold", "needed")},
            "seen": target_history.seen, "since": target_history.since or None, "decision": asdict(decision),
            "incident": target_history.incident.id if target_history.incident else None,
            "restarts_last_day": len(state.limiters[target].restarts),
            "circuit_open": state.limiters[target].open_reason or None,
            "rungs": [asdict(step) for step in ladder.recent(state.ladder, observation.moment.wall).steps] if target == "api" else [],
        }  # fmt: skip
    reasons = [v.en for v in verdicts.values() if v.word != "healthy"]
    evidence = {"api": observation.api.to_dict(), "page": observation.page.to_dict() if observation.page else None}
    several: dict[str, Any] = {}
    if observation.front is not None:
        evidence["front"] = observation.front.to_dict()
        several = {"replicas": [replica.to_dict() for replica in observation.replicas]}
    check = {
        "store": store.state, "settings": notices.settings_state(warnings), "period_s": settings.check_period_s, "cure": settings.cure,
        "hold": holds.why_no_restart(state.holds, observation.moment.wall) or None, "boot_id": observation.moment.boot_id,
        "run": state.last["runs"], "seen_s": seen_s,
    }  # fmt: skip
    return report.build(
        word, serving, reasons, observation.machine, observation.gpu, evidence, duration_s, observation.moment.wall, targets=targets,
        warnings=warnings, check=check, **several,
    )  # fmt: skip


def _persist(
    settings: Settings, store: Store, state: CheckerState, summary: dict[str, Any], verdicts: dict[str, Verdict],
    changes: list[Change], decisions: dict[str, Decision], messages: list[dict[str, Any]], observation: Observation,
) -> Store:  # fmt: skip
    """Stores the run in one transaction. Falls back to shared memory, and notes it in the report, if the disk refuses."""

    def write(target_store: Store) -> None:
        with target_store.transaction():
            words = {t: {"word": v.word, "rule": v.rule, "en": v.en, "zh": v.zh} for t, v in verdicts.items()}
            readings = report.finite(values_of(observation, state.histories["api"].busy_since, state.pace))
            readings["seen_s"] = summary["check"]["seen_s"]
            target_store.add_run(observation.moment.wall, report.finite(summary), words, readings)
            state.save(target_store)
            for change in changes:
                if change.kind == "flip":
                    target_store.add_flip(change.at, change.target, change.before, change.after, change.rule, change.en, change.zh)
                if change.incident is not None and change.kind != "flip":
                    closed_at = change.at if change.kind == "closed" else None
                    target_store.put_incident(asdict(change.incident), closed_at)
            for target, decision in decisions.items():
                if decision.kind in ("shadow", "hold"):
                    _note_once(target_store, target, decision, state, observation.moment.wall)
            if verdicts["api"].word == "healthy" and not settings.engine_url:
                target_store.put("cards_expected", len(observation.gpu.get("gpus") or ()))
            alerts.queue(target_store, messages, settings, observation.moment.wall)
            target_store.prune(observation.moment.wall)

    try:
        write(store)
        if store.state != summary["check"]["store"]:  # the store was replaced while it was written
            warn(store.state)
            summary["check"]["store"] = store.state
        return store
    except sqlite3.Error as error:
        store.close()
        fallback = Store.fallback(settings.log_dir, f"the store cannot be written ({error})")
        warn(fallback.lost)
        summary["check"]["store"] = fallback.lost
        write(fallback)
        return fallback


def _note_once(store: Store, target: str, decision: Decision, state: CheckerState, now: float) -> None:
    """One audit row for each reason of a hold, not one per run."""
    incident = state.histories[target].incident
    note = [decision.kind, decision.reason.split(":")[0], incident.id if incident else ""]
    if store.get(f"noted:{target}") != note:
        store.put(f"noted:{target}", note)
        store.add_action(now, target, decision.kind, "checker", "noted", decision.reason, note[2])


def _publish(summary: dict[str, Any], settings: Settings, store: Store, state: CheckerState) -> None:
    for name, write in (
        (baseline.FILE_NAME, lambda: baseline.write(state.accuracy, settings.log_dir)),
        (report.FILE_NAME, lambda: report.write(summary, settings.log_dir)),
        (exports.JSONL, lambda: exports.write(summary, settings, store)),
    ):
        try:
            write()
        except OSError as error:
            with contextlib.suppress(OSError):  # the server takes its modification time as a sign of life; a full disk still allows that
                os.utime(settings.log_dir / name)
            warn(f"{settings.log_dir / name} could not be written: {error.strerror or error}")
    for problem in exports.send(summary, settings, store) if settings.replica is None else ():
        warn(problem)
