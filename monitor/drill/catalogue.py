"""The faults of the drill, and the verdicts and restarts that each must cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from monitor.drill import faults
from monitor.drill.faults import FaultContext
from monitor.store.store import Store
from settings import Settings

SLOW_S = 5.0
Report = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """`verdicts`: those that count as detection for `target`. `visible_s`: how long the fault is invisible by definition, such as
    the deadline of a step. `restarts`: the exact number. `cured`: the target must recover while the fault is injected.
    `lasts_s`: minimum duration of a fault that must not be cured. `proof`: what one report must show as well.
    `why_not_in_force`: checked after each run; empty if the fault was effective since the run before. `note`: printed with the
    result.
    """

    name: str
    description: str
    inject: Callable[[FaultContext], AbstractContextManager[None]]
    verdicts: tuple[str, ...]
    target: str = "api"
    restarts: int = 1
    cured: bool = True
    visible_s: Callable[[Settings], float] = lambda settings: 0.0
    lasts_s: Callable[[FaultContext], float] = lambda context: 0.0
    proof: Callable[[Report, Store], bool] = lambda report, store: True
    why_not_in_force: Callable[[FaultContext], str] = lambda context: ""
    note: Callable[[FaultContext], str] = lambda context: ""
    runs: int = 40


def gpu_evidence_has(text: str) -> Callable[[Report, Store], bool]:
    return lambda report, store: text.lower() in json.dumps(report["evidence"]["gpu"]).lower()


def warning_raised(name: str) -> Callable[[Report, Store], bool]:
    return lambda report, store: any(warning["name"] == name for warning in report["warnings"])


def undelivered(report: Report, store: Store) -> bool:
    return bool(store.rows("SELECT id FROM outbox WHERE channel = 'webhook' AND sent_at IS NULL AND error IS NOT NULL"))


def circuit_open(report: Report, store: Store) -> bool:
    return bool(report["targets"]["api"]["circuit_open"])


def store_in_memory(report: Report, store: Store) -> bool:
    return "memory" in report["check"]["store"]


def not_judged(report: Report, store: Store) -> bool:
    return bool(report["targets"]["api"]["rule"] == "clock_jump")


def slowed(report: Report, store: Store) -> bool:
    return any(answer["seconds"] >= SLOW_S for answer in report["evidence"]["api"]["answers"])


UNAFFECTED = ("healthy", "busy")
FAULTS = (
    Fault("api-killed", "SIGKILL to the API", faults.kill, ("dead",)),
    Fault("page-killed", "SIGKILL to the page", partial(faults.kill, part="web"), ("dead",), "page"),
    Fault("api-frozen", "SIGSTOP to the API", faults.freeze, ("zombie",)),
    Fault("loop-blocked", "the event loop is blocked", faults.injected("block-loop", seconds=lambda context: 1800.0), ("zombie",)),
    Fault("step-hung", "a step of the engine never ends", faults.injected("hang-step", with_request=True), ("wedged",),
          visible_s=lambda s: s.stall_s),
    Fault("engine-dead", "the engine's thread loses its device", faults.injected("kill-engine", with_request=True), ("dead",)),
    Fault("pictures-broken", "pictures fail while text works", faults.injected("blind"), ("broken",)),
    Fault("page-script-broken", "the page's script raises", faults.break_script, ("broken",), "page", cured=False),
    Fault("port-stolen", "the API is gone and another process has its port", faults.steal_port, ("dead",), restarts=0, cured=False),
    Fault("disk-full", "no byte free for the logs and the store", faults.fill_disk, UNAFFECTED, restarts=0, cured=False, proof=store_in_memory),
    Fault("gpu-tool-hung", "nvidia-smi never answers", faults.fake_nvidia_smi("exec sleep 600"), UNAFFECTED, restarts=0, cured=False,
          proof=gpu_evidence_has("did not answer")),
    Fault("gpu-tool-garbage", "nvidia-smi prints nonsense", faults.fake_nvidia_smi("echo 'Failed to initialize NVML: Unknown Error'"),
          UNAFFECTED, restarts=0, cured=False, proof=gpu_evidence_has("gputil")),
    Fault("gpu-tool-gone", "no nvidia-smi and no NVML", faults.no_fault, UNAFFECTED, restarts=0, cured=False, proof=gpu_evidence_has("nvml")),
    Fault("slow-start", "killed, and its successor loads slowly", faults.start_slowly, ("dead",)),
    Fault("crash-loop", "killed, and every successor exits at once", faults.crash_on_start, ("dead",), restarts=3, cured=False,
          proof=circuit_open),
    Fault("clock-jump", "killed as the clock jumps by an hour: judged a run later", faults.jump_clock, ("dead",), proof=not_judged),
    Fault("long-prefill", "one step takes 60 s: must NOT restart", faults.injected("slow-step", seconds=lambda context: min(60.0, context.long_s), with_request=True),
          UNAFFECTED, restarts=0, cured=False, lasts_s=lambda context: min(75.0, context.long_s + 15), proof=slowed),
    Fault("gpu-at-100", "every card at 100 % load: must NOT restart", faults.full_gpu_load, UNAFFECTED, restarts=0, cured=False,
          proof=gpu_evidence_has('"load_percent": 100')),
    Fault("memory-at-limit", "memory at its limit: must NOT restart", faults.exceed_memory_limit, UNAFFECTED, restarts=0, cured=False,
          proof=warning_raised("memory_used_percent")),
    Fault("alert-channel-down", "the alert channel accepts nothing: must NOT restart", faults.block_alert_channel, UNAFFECTED, restarts=0,
          cured=False, proof=undelivered),
    Fault("saturated", "the queue full for ten minutes: must NOT restart", faults.saturate, UNAFFECTED, restarts=0, cured=False,
          lasts_s=lambda context: context.long_s, why_not_in_force=faults.why_queue_not_full, note=faults.queue_full_summary),
)  # fmt: skip
CRON_REMOVED, CRON_REMOVED_DESCRIPTION = "checker-gone", "cron was removed: the server notices its silent checker"
