"""Looks once at everything and returns it as evidence: readings first, then the probes side by side. Judges nothing."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from monitor.judge.evidence import Answer, ApiEvidence, Beat, Exchange, Look, Moment, PageEvidence, Process
from monitor.observe import external_engine as foreign
from monitor.observe import gpu, machine, ports, processes, websocket
from monitor.observe.exchange import Deadline
from monitor.observe.probes import Asker, look, visit
from settings import Settings

HEALTH_LIMIT_S = 2.0
SECOND_LOOK_LIMIT_S = 5.0
GPU_LIMIT_S = 12.0  # two children of 4 s and the time to end them
PAGE_LIMIT_S = 10.0
HEARTBEAT = "api.heartbeat.json"


@dataclass(frozen=True)
class Due:
    """What this run must ask although it could do without, decided by the caller from its memory."""

    question: bool = True
    script: bool = True
    oom_kills: int | None = None  # at the last run


@dataclass(frozen=True)
class Observation:
    """`page` is None where no page is expected here. `machine` and `gpu` are for the report and the thresholds."""

    moment: Moment
    api: ApiEvidence
    page: PageEvidence | None
    machine: dict[str, Any]
    gpu: dict[str, Any]
    asked: bool = False


def now() -> Moment:
    return Moment(time.time(), time.monotonic(), processes.boot_id())


def observe(settings: Settings, rng: random.Random, due: Due, moment: Moment, memory: foreign.Memory) -> Observation:
    """About a second or two when all is well; bounded by the limits of the probes in any case."""
    records = {part: processes.read_record(settings.log_dir, part) for part in ("api", "web")}
    api_record, web_record = records["api"], records["web"]
    elsewhere = bool(settings.engine_url)
    late: dict[str, Any] = {"gpus": [], "source": "none", "hung": True, "reason": "no answer in time"}
    gpu_reading = Deadline(gpu.read, GPU_LIMIT_S, late)
    alive = api_record is not None and processes.is_running(api_record)
    folders = (settings.log_dir if settings.log_dir.is_dir() else settings.log_dir.parent, *_model_cache())
    pid = api_record.pid if api_record is not None and alive and not elsewhere else None
    machine_reading: Deadline[dict[str, Any]] = Deadline(
        lambda: machine.read(pid, folders=folders), 5.0, {"reason": "the kernel did not answer"}
    )
    stuck_before = _is_stuck(pid)
    # Where neither was started here, both are expected; `./start.sh api` starts no page on purpose.
    page_expected = web_record is not None or api_record is None
    page = Deadline(lambda: _look_at_page(settings, due), 4 * PAGE_LIMIT_S, None) if page_expected else None
    api, asked = _look_at_api(settings, rng, due, memory, elsewhere)
    gpus, host = gpu_reading.result(), machine_reading.result()
    oom_now: int | None = host.get("oom_kills")
    oom_killed = oom_now is not None and due.oom_kills is not None and oom_now > due.oom_kills
    blind = _self_test()
    process = Process() if elsewhere else _process(api_record, stuck_before, oom_killed)
    api = ApiEvidence(
        api.url, process, None if elsewhere else read_beat(settings.log_dir, api_record, moment), api.first, api.answers,
        api.last, hardware_faults(gpus), blind,
    )  # fmt: skip
    found = page.result() if page is not None else None
    if found is not None:
        found = PageEvidence(
            found.url, _process(web_record, False, False), found.health, found.websocket, found.script, found.front, blind
        )
    elif page_expected:
        found = PageEvidence(page_url(settings), _process(web_record, False, False), blind=blind)
    gpu_evidence = {
        "load_percent": gpu.highest(gpus["gpus"], "load_percent"),
        "memory_used_mib": gpu.highest(gpus["gpus"], "memory_used_mib"),
        **gpus,
    }
    return Observation(moment, api, found, host, gpu_evidence, asked)


def _look_at_api(
    settings: Settings, rng: random.Random, due: Due, memory: foreign.Memory, elsewhere: bool
) -> tuple[ApiEvidence, bool]:
    """Health, the questions, and health again where one got no answer: did the engine move meanwhile?"""
    url = settings.engine_url.rstrip("/") if elsewhere else settings.api_base_url
    glance = (lambda limit_s: foreign.look(url, limit_s, memory, _key(settings))) if elsewhere else (lambda limit_s: look(url, limit_s))
    first, body = glance(min(HEALTH_LIMIT_S, settings.probe_timeout_s))
    if first.outcome == "refused" or first.state in ("loading", "dead", "draining", "stalled"):
        return ApiEvidence(url, first=first), False
    answers, asked = _ask(settings, url, rng, due, body, elsewhere)
    if all(answer.good for answer in answers) and first.answered:
        return ApiEvidence(url, first=first, answers=answers), asked
    last, _ = glance(SECOND_LOOK_LIMIT_S)
    return ApiEvidence(url, first=first, answers=answers, last=last), asked


def _ask(
    settings: Settings, url: str, rng: random.Random, due: Due, body: Mapping[str, Any], elsewhere: bool
) -> tuple[tuple[Answer, ...], bool]:
    fresh = body.get("success_age_s")
    credit_s = 0.0 if due.question else settings.probe_credit_s
    model = foreign.model_name(url, _key(settings)) if elsewhere else ""
    asker = Asker(url, _key(settings), _secret(settings.probe_token), rng, model)
    answers: list[Answer] = []
    asked = False
    for kind, ask in (("text", asker.about_text), ("picture", asker.about_picture)):
        age_s = fresh.get(kind) if isinstance(fresh, dict) else None
        if isinstance(age_s, int | float) and age_s < credit_s:
            answers.append(Answer(kind, "credited", detail=f"a user was answered {age_s:.0f} s ago"))
        elif answers and answers[-1].outcome in ("silent", "refused"):
            answers.append(Answer(kind, "skipped", detail="the one before got no answer"))
        else:
            answers.append(ask(settings.probe_timeout_s))
            asked = True
    return tuple(answers), asked


def _look_at_page(settings: Settings, due: Due) -> PageEvidence:
    url = page_url(settings)
    health = visit(f"{url}/_stcore/health", PAGE_LIMIT_S)
    if not health.good:
        return PageEvidence(url, health=health)
    # Behind its health route the page lets nobody in without the token.
    pass_ = f"?token={quote(_secret(settings.web_token))}" if settings.web_token else ""
    connection = websocket.handshake(f"{url}/_stcore/stream{pass_}", PAGE_LIMIT_S)
    script = visit(f"{url}/_stcore/script-health-check{pass_}", PAGE_LIMIT_S) if due.script else None
    front: Exchange | None = None
    if settings.front_url:
        front = visit(f"{settings.front_url.rstrip('/')}/_stcore/health", PAGE_LIMIT_S)
        if front.good:
            front = websocket.handshake(f"{settings.front_url.rstrip('/')}/_stcore/stream{pass_}", PAGE_LIMIT_S)
    return PageEvidence(url, health=health, websocket=connection, script=script, front=front)


def page_url(settings: Settings) -> str:
    host = settings.web_host
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.web_port}"


def read_beat(log_dir: Path, record: processes.ProcessRecord | None, moment: Moment) -> Beat | None:
    """The heartbeat of exactly the recorded process; one of an earlier process is none."""
    try:
        raw = json.loads((log_dir / HEARTBEAT).read_text(encoding="utf-8"))
        same = record is None or (raw["pid"] == record.pid and raw["start_time"] == record.start_time)
        if not same or raw["boot_id"] != moment.boot_id:
            return None
        clock = time.monotonic()
        return Beat(
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
    """Any thread in uninterruptible sleep: normal for a moment, so it is asked at the start and at the end of a run."""
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
    """What no restart can mend: errors that NVIDIA's list answers with "reset the GPU" or "reboot"."""
    return tuple(
        f"GPU {card['index']}: {fault}" for card in gpus.get("gpus", ()) for fault in card.get("faults") or ()
    )


def _self_test() -> str:
    """Can the checker reach its own machine at all? If not, nothing that it saw counts."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=1.0).close()
    except OSError as error:
        return f"its own connection to this machine fails ({error})"
    return ""


def _model_cache() -> tuple[Path, ...]:
    folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return (folder,) if folder.is_dir() else ()


def _key(settings: Settings) -> str:
    return _secret(settings.api_key)


def _secret(value: Any) -> str:
    return value.get_secret_value() if value else ""


__all__ = ["Due", "Look", "Observation", "hardware_faults", "now", "observe", "page_url", "read_beat"]
