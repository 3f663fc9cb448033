"""Collects the evidence of one run: readings and probes, in parallel where they do not disturb each other."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

import cgroup
from monitor.judge.accuracy import Accuracy, for_model
from monitor.judge.evidence import (
    Answer,
    ApiEvidence,
    EngineEvidence,
    EngineProgress,
    FrontEvidence,
    HealthReply,
    Heartbeat,
    Identity,
    Moment,
    Observation,
    PageEvidence,
    PageReply,
    Process,
    Traffic,
)  # fmt: skip
from monitor.judge.traffic import TrafficLog, add_run
from monitor.judge.verdict import Limits
from monitor.observe import (
    api_probe,
    external_engine,
    gpu,
    health_probe,
    machine,
    page_probe,
    ports,
    process_search,
    processes,
    self_report,
)
from monitor.observe.http_exchange import NO_FILES, Deadline, exchange
from monitor.observe.small_file import read_small
from settings import Settings

HEALTH_LIMIT_S = 2.0
SECOND_LOOK_LIMIT_S = 5.0
FRONT_LIMIT_S = 5.0
RESOLVE_LIMIT_S = 2.0
GPU_LIMIT_S = 12.0  # two children of 4 s and the time to end them
HEARTBEAT = "api.heartbeat.json"
FUTURE_S = 1.0  # a heartbeat that is younger than now by more than rounding is not this process's


@dataclass(frozen=True)
class ProbePlan:
    """What this run probes, decided by the caller from its state.

    `question`: ask even if users were answered recently; `script`: run the page's script; `oom_kills`: count at the last run.
    `traffic` is updated. `unproven_runs`: runs in a row until now in which the API did not know the probe token.
    `draining`: since when which process drains, as the last run returned it in `Observation.draining`.
    `accuracy`: what is known of the model's answers. `records`: the pid files as the last run saw them, by part.
    """

    question: bool = True
    script: bool = True
    machine: Mapping[str, Any] | None = None  # the counters of the machine's readings in the last run
    oom_kills: int | None = None
    traffic: TrafficLog = field(default_factory=TrafficLog)
    unproven_runs: int = 0
    limits: Limits = field(default_factory=Limits)
    accuracy: Accuracy = field(default_factory=Accuracy)
    records: Mapping[str, Any] = field(default_factory=dict)
    draining: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """What is known of whoever answers before anything is asked. `other`: who it is, if not the process started here.

    `no_credit`: why answers to users cannot replace questions; empty if they can. `unproven`: the very process that was
    started here does not know the probe token.
    """

    other: str = ""
    no_credit: str = ""
    unproven: bool = False


def now() -> Moment:
    return Moment(time.time(), time.monotonic(), processes.boot_id())


def observe(settings: Settings, rng: random.Random, plan: ProbePlan, moment: Moment, progress: EngineProgress) -> Observation:
    """Takes under a second for a healthy service and is bounded by the deadlines of its probes. Updates `progress`."""
    parts = _parts_of(settings)
    # Before the pid files are read, because start.sh removes the mark once it has written the new one.
    began = {part for part in parts if processes.is_restarting(settings.log_dir, part)}
    found = {
        part: process_search.find_record(settings.log_dir, part, port, remembered=processes.parse_record(plan.records.get(part)))
        for part, port in parts.items()
    }
    api_record, web_record, front_record = (found.get(part) for part in ("api", "web", "front"))
    several = "front" in parts
    external = settings.watches_engine_itself
    watched = api_record if not external and _is_here(settings.api_base_url) else None
    gpu_timeout: dict[str, Any] = {"gpus": [], "source": "none", "hung": True, "reason": "no answer in time"}
    gpu_reading = Deadline(gpu.read, GPU_LIMIT_S, gpu_timeout)
    alive = watched is not None and processes.is_running(watched)
    folders = (settings.log_dir if settings.log_dir.is_dir() else settings.log_dir.parent, *_model_cache())
    pid = watched.pid if watched is not None and alive else None
    machine_reading: Deadline[dict[str, Any]] = Deadline(
        lambda: machine.read(pid, folders=folders, before=plan.machine), 5.0, {"reason": "the kernel did not answer"}
    )
    stuck_before = _stuck_threads(pid)
    # `./start.sh api` starts no page on purpose. If neither part has a record, both are expected.
    page_expected = "web" in parts and (web_record is not None or (front_record if several else api_record) is None)
    page_probing: Deadline[PageEvidence | None] | None = None
    if page_expected:
        page_probing = Deadline(lambda: page_probe.probe_page(settings, plan.script), 4 * page_probe.LIMIT_S, None)
    beat = None if external else read_heartbeat(settings.log_dir, watched, moment)
    front: FrontEvidence | None = None
    if several:
        front, api, asked = _probe_front(settings), ApiEvidence(settings.api_base_url), False
    else:
        api, asked = _probe_api(settings, rng, plan, moment, progress, watched, beat)
    gpus, host = _own_cards(gpu_reading.result(), settings.gpus), machine_reading.result()
    oom_now: int | None = host.get("oom_kills")
    oom_killed = oom_now is not None and plan.oom_kills is not None and oom_now > plan.oom_kills
    blind = _self_test() or _short_of_files(api)
    if front is not None:
        process = _process(front_record, {}, False, processes.failed_start(settings.log_dir, "front"))
        process = replace(process, restarting=_restarting(settings.log_dir, "front", front_record, "front" in began))
        front = replace(front, process=process, blind=blind)
    elif not external:
        # Again, because the questions take time, in which it may have ended or been blocked.
        beat = read_heartbeat(settings.log_dir, watched, moment)
        process = _process(watched, stuck_before, oom_killed, processes.failed_start(settings.log_dir, "api"))
        api = replace(api, process=replace(process, restarting=_restarting(settings.log_dir, "api", watched, "api" in began)), beat=beat)
    api = replace(api, hardware=hardware_faults(gpus), blind=blind)
    page: PageEvidence | None = None
    if page_probing is not None:
        page = page_probing.result() or PageEvidence(page_probe.page_url(settings))
        process = _process(web_record, {}, False, processes.failed_start(settings.log_dir, "web"))
        page = replace(page, process=replace(process, restarting=_restarting(settings.log_dir, "web", web_record, "web" in began)), blind=blind)
    gpu_evidence = {
        "load_percent": gpu.highest(gpus["gpus"], "load_percent"),
        "memory_used_mib": gpu.highest(gpus["gpus"], "memory_used_mib"),
        **gpus,
    }
    records = {part: asdict(record) for part, record in found.items() if record is not None}
    return Observation(moment, api, page, host, gpu_evidence, asked, records, front)


def _parts_of(settings: Settings) -> dict[str, int]:
    """What this run observes by itself, and its port: a replica's run only its API, the run of the whole everything else."""
    if settings.replica is not None:
        return {"api": settings.api_port}
    if settings.replica_count > 1:
        return {"front": settings.api_port, "web": settings.web_port}
    return {"api": settings.api_port, "web": settings.web_port}


def _probe_front(settings: Settings) -> FrontEvidence:
    reply = exchange(f"{settings.api_base_url}/glm-front", FRONT_LIMIT_S)
    return FrontEvidence(settings.api_base_url, reply=PageReply(reply.outcome, reply.seconds, reply.status, reply.detail))


def _own_cards(reading: dict[str, Any], cards: str) -> dict[str, Any]:
    """The reading without the cards that GLM_GPUS leaves to others."""
    if not cards:
        return reading
    return {**reading, "gpus": [card for card in reading["gpus"] if str(card.get("index")) in cards.split(",")]}


def _probe_api(
    settings: Settings, rng: random.Random, plan: ProbePlan, moment: Moment, progress: EngineProgress,
    record: processes.ProcessRecord | None, beat: Heartbeat | None,
) -> tuple[ApiEvidence, bool]:  # fmt: skip
    """GET /health, the questions, and /health again if one failed, to see whether the engine made steps meanwhile."""
    url = settings.engine_base_url if settings.watches_engine_itself else settings.api_base_url

    def get_health(limit_s: float) -> HealthReply:
        if settings.watches_engine_itself:
            return external_engine.get_health(url, limit_s, progress, _secret(settings.engine_key or settings.api_key))[0]
        return health_probe.get_health(url, limit_s, _secret(settings.probe_token))

    first = get_health(min(HEALTH_LIMIT_S, settings.probe_timeout_s))
    evidence = ApiEvidence(url, beat=beat, first=first)
    # The kernel is asked after the answer, so that what it says is the newer.
    process = _process(record, {}, False)
    other = _other(first, record)
    traffic = None
    if not other and process.port_owner != "stranger" and process.state != "gone":
        traffic = add_run(plan.traffic, evidence.report, moment, plan.limits)
    standing = Standing()
    if not settings.watches_engine_itself:
        standing = _standing(first, record, process, other, bool(settings.probe_token), traffic, plan.limits)
    evidence = replace(
        evidence, draining_s=_draining_s(first, plan.draining, moment), other=other, no_credit=standing.no_credit, unproven_runs=plan.unproven_runs + 1 if standing.unproven else 0,
        traffic=traffic,
    )  # fmt: skip
    if settings.engine_url and not settings.watches_engine_itself:
        evidence = replace(evidence, engine=_engine_behind(settings, progress))
    if first.outcome == "refused" or first.state in ("loading", "dead", "draining", "stalled"):
        return evidence, False
    model_key = _model_key(settings, url)
    answers, asked = _ask(settings, url, rng, plan, first, standing.no_credit, model_key)
    evidence = replace(evidence, answers=answers, model_key=model_key)
    if all(answer.good for answer in answers) and first.answered:
        return evidence, asked
    return replace(evidence, last=get_health(SECOND_LOOK_LIMIT_S)), asked


def _engine_behind(settings: Settings, progress: EngineProgress) -> EngineEvidence:
    """What the engine says of itself, and the kernel of its process where it was started here."""
    limit_s = min(SECOND_LOOK_LIMIT_S, settings.probe_timeout_s)
    reply = external_engine.get_health(settings.engine_base_url, limit_s, progress, _secret(settings.engine_key))[0]
    if not settings.engine_command:
        return EngineEvidence(settings.engine_url, reply)
    record = process_search.find_record(settings.log_dir, "engine", settings.engine_port)
    failure = processes.failed_start(settings.log_dir, "engine")
    return EngineEvidence(settings.engine_url, reply, _process(record, {}, False, failure), True)


def _model_key(settings: Settings, url: str) -> dict[str, str] | None:
    source = external_engine if settings.watches_engine_itself else api_probe
    secret = settings.engine_key or settings.api_key if settings.watches_engine_itself else settings.api_key
    key = source.model_key(url, _secret(secret), min(HEALTH_LIMIT_S, settings.probe_timeout_s))
    return {**key, "engine": settings.engine_url} if key is not None and settings.engine_url else key


def _ask(
    settings: Settings, url: str, rng: random.Random, plan: ProbePlan, health: HealthReply, no_credit: str,
    model_key: dict[str, str] | None,
) -> tuple[tuple[Answer, ...], bool]:
    """(answers, whether a question was asked). A recent answer to a user is credited in place of a question."""
    credit_s = 0.0 if plan.question or no_credit else settings.probe_credit_s
    key = _secret(settings.engine_key or settings.api_key if settings.watches_engine_itself else settings.api_key)
    model = model_key["model"] if settings.watches_engine_itself and model_key else ""
    idle = health.state == "idle" or health.pending == 0
    prober = api_probe.Prober(url, key, _secret(settings.probe_token), rng, model, for_model(plan.accuracy, model_key), idle)
    answers: list[Answer] = []
    asked = False
    for kind, ask in (("text", prober.ask_text), ("picture", prober.ask_image)):
        age_s = health.success_age_s.get(kind)
        if age_s is not None and age_s < credit_s:
            answers.append(Answer(kind, "credited", detail=f"a user was answered {age_s:.0f} s ago"))
        elif answers and answers[-1].outcome in ("silent", "refused"):
            answers.append(Answer(kind, "skipped", detail="the previous question got no answer"))
        else:
            answers.append(ask(settings.probe_timeout_s))
            asked = True
    return tuple(answers), asked


def _draining_s(first: HealthReply, before: Mapping[str, Any], moment: Moment) -> float | None:
    if first.state != "draining":
        return None
    since = before.get("since") if before.get("process") == _name_of(first, moment) else None
    return max(0.0, moment.monotonic - since) if isinstance(since, int | float) else 0.0


def draining_of(api: ApiEvidence, moment: Moment) -> dict[str, Any]:
    """For the next run: which process drains, and since when (CLOCK_MONOTONIC)."""
    if api.draining_s is None:
        return {}
    return {"process": _name_of(api.first, moment), "since": moment.monotonic - api.draining_s}


def _name_of(reply: HealthReply, moment: Moment) -> str:
    one = reply.report.identity
    return f"{one.pid} {one.start_time} {one.boot_id}" if one else moment.boot_id


def _other(first: HealthReply, record: processes.ProcessRecord | None) -> str:
    """Who says to answer, if it is not the recorded process; empty if it is, or does not say."""
    one = first.report.identity
    if one is None or (record is not None and _is_recorded(one, record)):
        return ""
    if record is None and not _is_of_another_folder(one):
        return ""
    return f"process {one.pid}"


def _is_of_another_folder(one: Identity) -> bool:
    """Whether it surely is a process of this machine that works in another folder, such as a second copy of the project."""
    stat = processes.read_stat(one.pid)
    same = stat is not None and stat.start_time == one.start_time and one.boot_id == processes.boot_id()
    return same and processes.works_in(one.pid, processes.ROOT) is False


def _is_recorded(one: Identity, record: processes.ProcessRecord) -> bool:
    same = one.pid == record.pid and one.start_time == record.start_time
    return same and one.boot_id == (record.boot_id or one.boot_id)


def _standing(
    first: HealthReply, record: processes.ProcessRecord | None, process: Process, other: str, has_token: bool,
    traffic: Traffic | None, limits: Limits,
) -> Standing:  # fmt: skip
    """Kernel facts first; then who answers, by its own words and a proof of them; then how users fare."""
    if record is not None and (process.state != "runs" or process.port_owner == "stranger"):
        holder = f", the port is held by {process.holder}" if process.port_owner == "stranger" else ""
        return Standing(other, f"the process is {'running' if process.state == 'runs' else process.state}{holder}")
    if other:
        return Standing(other, f"{other} answers, not the one that was started here")
    if not first.answered:
        return Standing(no_credit="/health was not answered")
    if not has_token:
        return Standing(no_credit="GLM_PROBE_TOKEN is not set, so that nothing can be proven")
    if first.report.identity is None:
        return Standing(no_credit="the API is of a version that proves nothing")
    if not first.proven:
        why = "its proof is wrong" if first.proven is False else "it gave no proof"
        # Certain only where kernel and API agree on who it is.
        ours = record is not None and process.port_owner == "ours"
        return Standing(no_credit=f"{why}: another GLM_PROBE_TOKEN, or something between that changes answers", unproven=ours)
    if traffic is None:
        return Standing(no_credit="how many users failed since the last run is not known")
    if traffic.share > limits.failure_share:
        return Standing(no_credit=f"{traffic.failures} of {traffic.answered + traffic.failures} users' requests failed")
    return Standing()


def _is_here(url: str) -> bool:
    """Whether the URL is of this machine, so that the process in the pid file answers there; True if nobody can say."""
    host = urlsplit(url).hostname or ""

    def look() -> bool:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        return any(_can_bind(address) for address in addresses)

    try:
        return Deadline(look, RESOLVE_LIMIT_S, True).result()
    except (OSError, UnicodeError):
        return True


def _can_bind(address: str) -> bool:
    """An address of this machine is one that a socket can be bound to."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def read_heartbeat(log_dir: Path, record: processes.ProcessRecord | None, moment: Moment) -> Heartbeat | None:
    """The heartbeat of the recorded process; None if the file is missing or invalid, from another process or the future."""
    try:
        raw = json.loads(read_small(log_dir / HEARTBEAT))
        same = record is None or (raw["pid"] == record.pid and raw["start_time"] == record.start_time)
        if not same or raw["boot_id"] != moment.boot_id:
            return None
        clock = time.monotonic()
        beat_age_s, written_age_s = clock - float(raw["beat_at"]), clock - float(raw["written_at"])
        # Written so that NaN fails too.
        if not (beat_age_s >= -FUTURE_S and written_age_s >= -FUTURE_S):
            return None
        return Heartbeat(
            beat_age_s=round(max(0.0, beat_age_s), 1),
            written_age_s=round(max(0.0, written_age_s), 1),
            state=self_report.text(raw["state"], 40),
            phase=self_report.text(raw["phase"], 40),
            steps=self_report.count(raw["steps"]),
            pending=(self_report.count(raw["running"]) or 0) + (self_report.count(raw["waiting"]) or 0),
            no_progress_s=self_report.number(raw["no_progress_s"]) or 0.0,
            deadline_s=self_report.number(raw["deadline_s"]),
            progress=self_report.number(raw["progress"]),
            report=self_report.parse(raw),
            kv_peak_tokens=self_report.count(raw.get("kv_peak_tokens")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _process(record: processes.ProcessRecord | None, stuck_before: Mapping[str, str], oom_killed: bool, failure: str = "") -> Process:
    """`stuck_before`: its threads in uninterruptible sleep at the start of the run. `failure`: of the last start."""
    if record is None:
        return Process(start_failure=failure)
    owners = ports.listeners(record.port)
    if not processes.is_running(record):
        holder = ", ".join(owner.describe() for owner in owners)
        return Process("gone", record.pid, None, "stranger" if owners else "nobody", holder, oom_killed)
    stat = processes.read_stat(record.pid)
    letter = stat.state if stat else "?"
    stuck = bool(stuck_before.items() & _stuck_threads(record.pid).items())
    state = "stuck" if stuck else {"T": "stopped", "t": "traced"}.get(letter, "runs")
    frozen = cgroup.frozen_by(membership=processes.PROC / str(record.pid) / "cgroup")
    if frozen is not None:
        state = "frozen"  # the kernel shows some of those in uninterruptible sleep
    files, most = processes.open_files(record.pid)
    return Process(
        state, record.pid, processes.age_s(record), *_owner(record, owners), open_files=files, open_files_limit=most,
        frozen_by=str(frozen or ""),
    )  # fmt: skip


def _restarting(log_dir: Path, part: str, record: processes.ProcessRecord | None, began: bool) -> bool:
    """Whether a restart by a person was in progress in any moment of the run. `began`: at its start, `record`: seen then."""
    if record is None or began or processes.is_restarting(log_dir, part):
        return record is not None
    newer = processes.read_record(log_dir, part)
    return newer is not None and newer != record and processes.is_running(newer) and not processes.is_running(record)


def _owner(record: processes.ProcessRecord, owners: list[ports.Listener]) -> tuple[str, str]:
    if not owners:
        return "nobody", ""
    if any(owner.pid is None for owner in owners):
        return "unknown", ""
    ours = set(processes.members(record))
    strangers = [owner for owner in owners if owner.pid not in ours]
    if len(strangers) == len(owners):
        return "stranger", ", ".join(owner.describe() for owner in strangers)
    return "ours", ""


def _stuck_threads(pid: int | None) -> dict[str, str]:
    """The threads in uninterruptible sleep, with how often each was scheduled.

    That sleep is normal for a moment. A thread that is in it at the start and the end of a run and was never scheduled in
    between is stuck.
    """
    if pid is None:
        return {}
    stuck = {}
    for folder in (processes.PROC / str(pid) / "task").glob("*"):
        try:
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            if text.rpartition(")")[2].split()[0] == "D":
                status = (folder / "status").read_text(encoding="utf-8", errors="replace")
                stuck[folder.name] = " ".join(line for line in status.splitlines() if "ctxt_switches" in line)
        except (OSError, IndexError):
            continue
    return stuck


def hardware_faults(gpus: Mapping[str, Any]) -> tuple[str, ...]:
    """GPU errors that no restart can repair; gpu_child.py has the list."""
    return tuple(
        f"GPU {card['index']}: {fault}" for card in gpus.get("gpus", ()) for fault in card.get("faults") or ()
    )


def _self_test() -> str:
    """Why the checker cannot even connect to itself, in which case no probe counts; empty if it can."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=1.0).close()
    except OSError as error:
        return f"its own connection to this machine fails ({error})"
    return ""


def _short_of_files(api: ApiEvidence) -> str:
    """Why a probe of the API was never sent; empty if all were."""
    details = {(api.last or api.first).detail, api.first.detail, *(answer.detail for answer in api.answers if not answer.status)}
    return NO_FILES if NO_FILES in details else ""


def _model_cache() -> tuple[Path, ...]:
    folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return (folder,) if folder.is_dir() else ()


def _secret(value: SecretStr | None) -> str:
    return value.get_secret_value() if value else ""
