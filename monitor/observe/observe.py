"""Collects the evidence of one run: readings and probes, in parallel where they do not disturb each other."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from monitor.judge.accuracy import Accuracy, for_model
from monitor.judge.evidence import (
    Answer,
    ApiEvidence,
    EngineProgress,
    HealthReply,
    Heartbeat,
    Moment,
    Observation,
    PageEvidence,
    Process,
)  # fmt: skip
from monitor.observe import api_probe, external_engine, gpu, machine, page_probe, ports, processes
from monitor.observe.http_exchange import Deadline
from settings import Settings

HEALTH_LIMIT_S = 2.0
SECOND_LOOK_LIMIT_S = 5.0
GPU_LIMIT_S = 12.0  # two children of 4 s and the time to end them
HEARTBEAT = "api.heartbeat.json"
GetHealth = Callable[[float], tuple[HealthReply, dict[str, Any]]]


@dataclass(frozen=True)
class ProbePlan:
    """What this run probes, decided by the caller from its state.

    `question`: ask even if users were answered recently; `script`: run the page's script; `oom_kills`: count at the last run;
    `accuracy`: what is known of the model's answers.
    """

    question: bool = True
    script: bool = True
    oom_kills: int | None = None
    accuracy: Accuracy = field(default_factory=Accuracy)


def now() -> Moment:
    return Moment(time.time(), time.monotonic(), processes.boot_id())


def observe(settings: Settings, rng: random.Random, plan: ProbePlan, moment: Moment, progress: EngineProgress) -> Observation:
    """Takes under a second for a healthy service and is bounded by the deadlines of its probes. Updates `progress`."""
    records = {part: processes.read_record(settings.log_dir, part) for part in ("api", "web")}
    api_record, web_record = records["api"], records["web"]
    external = bool(settings.engine_url)
    gpu_timeout: dict[str, Any] = {"gpus": [], "source": "none", "hung": True, "reason": "no answer in time"}
    gpu_reading = Deadline(gpu.read, GPU_LIMIT_S, gpu_timeout)
    alive = api_record is not None and processes.is_running(api_record)
    folders = (settings.log_dir if settings.log_dir.is_dir() else settings.log_dir.parent, *_model_cache())
    pid = api_record.pid if api_record is not None and alive and not external else None
    machine_reading: Deadline[dict[str, Any]] = Deadline(
        lambda: machine.read(pid, folders=folders), 5.0, {"reason": "the kernel did not answer"}
    )
    stuck_before = _is_stuck(pid)
    # `./start.sh api` starts no page on purpose. If neither part has a record, both are expected.
    page_expected = web_record is not None or api_record is None
    page_probing: Deadline[PageEvidence | None] | None = None
    if page_expected:
        page_probing = Deadline(lambda: page_probe.probe_page(settings, plan.script), 4 * page_probe.LIMIT_S, None)
    api, asked = _probe_api(settings, rng, plan, progress)
    gpus, host = gpu_reading.result(), machine_reading.result()
    oom_now: int | None = host.get("oom_kills")
    oom_killed = oom_now is not None and plan.oom_kills is not None and oom_now > plan.oom_kills
    blind = _self_test()
    if not external:
        api = replace(
            api, process=_process(api_record, stuck_before, oom_killed), beat=read_heartbeat(settings.log_dir, api_record, moment)
        )
    api = replace(api, hardware=hardware_faults(gpus), blind=blind)
    page: PageEvidence | None = None
    if page_probing is not None:
        page = page_probing.result() or PageEvidence(page_probe.page_url(settings))
        page = replace(page, process=_process(web_record, False, False), blind=blind)
    gpu_evidence = {
        "load_percent": gpu.highest(gpus["gpus"], "load_percent"),
        "memory_used_mib": gpu.highest(gpus["gpus"], "memory_used_mib"),
        **gpus,
    }
    return Observation(moment, api, page, host, gpu_evidence, asked)


def _probe_api(settings: Settings, rng: random.Random, plan: ProbePlan, progress: EngineProgress) -> tuple[ApiEvidence, bool]:
    """GET /health, the questions, and /health again if one failed, to see whether the engine made steps meanwhile."""
    get_health: GetHealth
    if settings.engine_url:
        url = settings.engine_url.rstrip("/")
        get_health = partial(external_engine.get_health, url, progress=progress, key=_secret(settings.api_key))
    else:
        url = settings.api_base_url
        get_health = partial(api_probe.get_health, url)
    first, body = get_health(min(HEALTH_LIMIT_S, settings.probe_timeout_s))
    if first.outcome == "refused" or first.state in ("loading", "dead", "draining", "stalled"):
        return ApiEvidence(url, first=first), False
    model_key = _model_key(settings, url)
    answers, asked = _ask(settings, url, rng, plan, body, model_key)
    evidence = ApiEvidence(url, first=first, answers=answers, model_key=model_key)
    if all(answer.good for answer in answers) and first.answered:
        return evidence, asked
    last, _ = get_health(SECOND_LOOK_LIMIT_S)
    return replace(evidence, last=last), asked


def _model_key(settings: Settings, url: str) -> dict[str, str] | None:
    source = external_engine if settings.engine_url else api_probe
    return source.model_key(url, _secret(settings.api_key), min(HEALTH_LIMIT_S, settings.probe_timeout_s))


def _ask(
    settings: Settings, url: str, rng: random.Random, plan: ProbePlan, health: Mapping[str, Any],
    model_key: dict[str, str] | None,
) -> tuple[tuple[Answer, ...], bool]:
    """(answers, whether a question was asked). A recent answer to a user is credited in place of a question."""
    ages = health.get("success_age_s")
    credit_s = 0.0 if plan.question else settings.probe_credit_s
    key = _secret(settings.api_key)
    model = model_key["model"] if settings.engine_url and model_key else ""
    idle = health.get("state") == "idle" or health.get("pending") == 0
    prober = api_probe.Prober(url, key, _secret(settings.probe_token), rng, model, for_model(plan.accuracy, model_key), idle)
    answers: list[Answer] = []
    asked = False
    for kind, ask in (("text", prober.ask_text), ("picture", prober.ask_image)):
        age_s = ages.get(kind) if isinstance(ages, dict) else None
        if isinstance(age_s, int | float) and age_s < credit_s:
            answers.append(Answer(kind, "credited", detail=f"a user was answered {age_s:.0f} s ago"))
        elif answers and answers[-1].outcome in ("silent", "refused"):
            answers.append(Answer(kind, "skipped", detail="the previous question got no answer"))
        else:
            answers.append(ask(settings.probe_timeout_s))
            asked = True
    return tuple(answers), asked


def read_heartbeat(log_dir: Path, record: processes.ProcessRecord | None, moment: Moment) -> Heartbeat | None:
    """The heartbeat of the recorded process; None if the file is missing, invalid or from another process."""
    try:
        raw = json.loads((log_dir / HEARTBEAT).read_text(encoding="utf-8"))
        same = record is None or (raw["pid"] == record.pid and raw["start_time"] == record.start_time)
        if not same or raw["boot_id"] != moment.boot_id:
            return None
        clock = time.monotonic()
        return Heartbeat(
            beat_age_s=round(clock - raw["beat_at"], 1),
            written_age_s=round(clock - raw["written_at"], 1),
            state=str(raw["state"]),
            phase=str(raw["phase"]),
            steps=int(raw["steps"]),
            pending=int(raw["running"]) + int(raw["waiting"]),
            no_progress_s=float(raw["no_progress_s"]),
            deadline_s=float(raw["deadline_s"]),
            progress=float(raw["progress"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _process(record: processes.ProcessRecord | None, stuck_before: bool, oom_killed: bool) -> Process:
    if record is None:
        return Process()
    owners = ports.listeners(record.port)
    if not processes.is_running(record):
        holder = ", ".join(owner.describe() for owner in owners)
        return Process("gone", record.pid, None, "stranger" if owners else "nobody", holder, oom_killed)
    stat = processes.read_stat(record.pid)
    letter = stat.state if stat else "?"
    stuck = stuck_before and _is_stuck(record.pid)
    state = "stuck" if stuck else {"T": "stopped", "t": "traced"}.get(letter, "runs")
    return Process(state, record.pid, processes.age_s(record), *_owner(record, owners))


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


def _is_stuck(pid: int | None) -> bool:
    """Whether a thread is in uninterruptible sleep. Normal for a moment, so it is read at the start and end of a run."""
    if pid is None:
        return False
    try:
        threads = os.listdir(processes.PROC / str(pid) / "task")
    except OSError:
        return False
    for thread in threads:
        try:
            text = (processes.PROC / str(pid) / "task" / thread / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if text.rpartition(")")[2].split()[0] == "D":
            return True
    return False


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


def _model_cache() -> tuple[Path, ...]:
    folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return (folder,) if folder.is_dir() else ()


def _secret(value: SecretStr | None) -> str:
    return value.get_secret_value() if value else ""
