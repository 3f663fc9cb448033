"""One run of the check: readings first, then the probes in parallel, then the verdict. Returns the report."""

from __future__ import annotations

import random
import time
from dataclasses import asdict

from monitor import gpu, machine, processes, report
from monitor.probes import Answer, Deadline, Reply, ask_surely, get
from monitor.verdict import Evidence, judge
from settings import Settings

HEALTH_LIMIT_S = 2.0
GPU_LIMIT_S = 12.0  # two children of 4 s and the time to end them


def run(settings: Settings, rng: random.Random) -> dict:
    """Takes about a second when all is well and `probe_timeout_s` plus a second at most."""
    started = time.monotonic()
    api = processes.read_record(settings.log_dir, "api")
    web = processes.read_record(settings.log_dir, "web")
    api_runs = api is not None and processes.is_running(api)
    # The processor is read before the question, which would be a good part of its load.
    late: dict = {"gpus": [], "source": "none", "hung": True, "reason": "no answer in time"}
    gpu_reading = Deadline(gpu.read, GPU_LIMIT_S, late)
    machine_reading = machine.read(api.pid if api is not None and api_runs else None)

    limit_s = settings.probe_timeout_s
    # Started here without the page: `./start.sh api`. Where neither was started here, both are expected.
    page_expected = web is not None or api is None
    page = Deadline(lambda: get(_page_url(settings), limit_s), limit_s, _late(limit_s)) if page_expected else None
    health, answer, health_after = _probe_api(settings, limit_s, rng)
    process = _process(api, api_runs)
    page_reply = page.result() if page else None
    evidence = Evidence(settings.api_base_url, health, answer, health_after, page_reply, process["state"])
    verdict = judge(evidence)

    gpus = gpu_reading.result()
    gpu_evidence = {
        "load_percent": gpu.highest(gpus["gpus"], "load_percent"),
        "memory_used_mib": gpu.highest(gpus["gpus"], "memory_used_mib"),
        **gpus,
    }
    probes = {
        "api": {
            "url": settings.api_base_url,
            "process": process,
            "health": asdict(health),
            "question": asdict(answer),
            "health_after": asdict(health_after) if health_after else None,
        },
        "page": {
            "url": _page_url(settings),
            "process": _process(web, web is not None and processes.is_running(web)),
            "health": asdict(page_reply) if page_reply else None,
            "reason": None if page_expected else "not started here",
        },
    }
    duration_s = time.monotonic() - started
    reasons = list(verdict.reasons)
    return report.build(verdict.word, verdict.serving, reasons, machine_reading, gpu_evidence, probes, duration_s)


def _probe_api(settings: Settings, limit_s: float, rng: random.Random) -> tuple[Reply, Answer, Reply | None]:
    """Health, the question, and health again where the question got no answer: did the engine move meanwhile?"""
    started = time.monotonic()
    url = f"{settings.api_base_url}/health"
    health_limit_s = min(HEALTH_LIMIT_S, limit_s / 4)
    health = get(url, health_limit_s)
    state = (health.body or {}).get("state")
    if health.outcome == "refused" or state in ("loading", "dead", "draining"):
        return health, Answer("skipped", detail=str(state or health.detail)), None
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    # Leave time for the second look.
    answer = ask_surely(settings.api_base_url, key, limit_s - (time.monotonic() - started) - health_limit_s, rng)
    unanswered = answer.outcome == "silent" or answer.status == 503
    return health, answer, get(url, health_limit_s) if unanswered else None


def _page_url(settings: Settings) -> str:
    host = settings.web_host
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.web_port}/_stcore/health"


def _late(limit_s: float) -> Reply:
    return Reply("silent", limit_s, detail=f"no answer within {limit_s:.1f} s")


def _process(record: processes.ProcessRecord | None, runs: bool) -> dict:
    """The kernel's word on what start.sh started."""
    if record is None:
        return {"state": "no process was started here by start.sh"}
    state = f"the process that start.sh started (pid {record.pid}) {'runs' if runs else 'is gone'}"
    return {"state": state, "pid": record.pid, "port": record.port}
