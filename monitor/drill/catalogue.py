"""The faults that the drill makes, and what the checker must conclude from each."""

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
    """`words`: the verdicts that the checker must reach for `target`. `visible_s`: how long the fault is invisible by definition, such as
    the deadline of a step. `restarts`: exactly so many. `cured`: the target must recover while the fault is still made.
    `lasts_s`: how long a fault is held that must not be cured. `proof`: what else one report must show.
    `in_force`: asked after each run, why the fault was not really made since the run before. `note`: printed beside the result.
    """

    name: str
    what: str
    make: Callable[[FaultContext], AbstractContextManager[None]]
    words: tuple[str, ...]
    target: str = "api"
    restarts: int = 1
    cured: bool = True
    visible_s: Callable[[Settings], float] = lambda settings: 0.0
    lasts_s: Callable[[FaultContext], float] = lambda context: 0.0
    proof: Callable[[Report, Store], bool] = lambda report, store: True
    in_force: Callable[[FaultContext], str] = lambda context: ""
    note: Callable[[FaultContext], str] = lambda context: ""
    runs: int = 40


def gpu_says(text: str) -> Callable[[Report, Store], bool]:
    return lambda report, store: text.lower() in json.dumps(report["evidence"]["gpu"]).lower()


def warns(name: str) -> Callable[[Report, Store], bool]:
    return lambda report, store: any(warning["name"] == name for warning in report["warnings"])


def undelivered(report: Report, store: Store) -> bool:
    return bool(store.rows("SELECT id FROM outbox WHERE channel = 'webhook' AND sent_at IS NULL AND error IS NOT NULL"))


def circuit_open(report: Report, store: Store) -> bool:
    return bool(report["targets"]["api"]["circuit_open"])


def in_memory(report: Report, store: Store) -> bool:
    return "memory" in report["check"]["store"]


def not_judged(report: Report, store: Store) -> bool:
    return bool(report["targets"]["api"]["rule"] == "clock_jump")


def slowed(report: Report, store: Store) -> bool:
    return any(answer["seconds"] >= SLOW_S for answer in report["evidence"]["api"]["answers"])


CALM = ("healthy", "busy")
FAULTS = (
    Fault("api-killed", "SIGKILL to the API", faults.kill, ("dead",)),
    Fault("page-killed", "SIGKILL to the page", partial(faults.kill, part="web"), ("dead",), "page"),
    Fault("api-frozen", "SIGSTOP to the API", faults.freeze, ("zombie",)),
    Fault("loop-blocked", "the event loop stands still", faults.injected("block-loop", seconds=lambda context: 1800.0), ("zombie",)),
    Fault("step-hung", "a step of the engine never ends", faults.injected("hang-step", with_request=True), ("wedged",),
          visible_s=lambda s: s.stall_s),
    Fault("engine-dead", "the engine's thread loses its device", faults.injected("kill-engine", with_request=True), ("dead",)),
    Fault("pictures-broken", "pictures fail while text works", faults.injected("blind"), ("broken",)),
    Fault("page-script-broken", "the page's script raises", faults.break_script, ("broken",), "page", cured=False),
    Fault("port-stolen", "the API is gone and a stranger has its port", faults.steal_port, ("dead",), restarts=0, cured=False),
    Fault("disk-full", "no byte free for the logs and the store", faults.fill_disk, CALM, restarts=0, cured=False, proof=in_memory),
    Fault("gpu-tool-hung", "nvidia-smi never answers", faults.stand_in_tool("exec sleep 600"), CALM, restarts=0, cured=False,
          proof=gpu_says("did not answer")),
    Fault("gpu-tool-garbage", "nvidia-smi prints nonsense", faults.stand_in_tool("echo 'Failed to initialize NVML: Unknown Error'"),
          CALM, restarts=0, cured=False, proof=gpu_says("gputil")),
    Fault("gpu-tool-gone", "no nvidia-smi and no NVML", faults.nothing, CALM, restarts=0, cured=False, proof=gpu_says("nvml")),
    Fault("slow-start", "killed, and its successor loads slowly", faults.start_slowly, ("dead",)),
    Fault("crash-loop", "killed, and every successor ends at once", faults.crash_on_start, ("dead",), restarts=3, cured=False,
          proof=circuit_open),
    Fault("clock-jump", "killed as the clock jumps by an hour: judged a run later", faults.jump_clock, ("dead",), proof=not_judged),
    Fault("long-prefill", "one step takes 60 s: must NOT restart", faults.injected("slow-step", seconds=lambda context: min(60.0, context.long_s), with_request=True),
          CALM, restarts=0, cured=False, lasts_s=lambda context: min(75.0, context.long_s + 15), proof=slowed),
    Fault("gpu-at-100", "every card at 100 % load: must NOT restart", faults.burn, CALM, restarts=0, cured=False,
          proof=gpu_says('"load_percent": 100')),
    Fault("memory-at-limit", "memory at its limit: must NOT restart", faults.fill_memory, CALM, restarts=0, cured=False,
          proof=warns("memory_used_percent")),
    Fault("alert-channel-down", "the alert channel accepts nothing: must NOT restart", faults.cut_channel, CALM, restarts=0,
          cured=False, proof=undelivered),
    Fault("saturated", "the queue full for ten minutes: must NOT restart", faults.saturate, CALM, restarts=0, cured=False,
          lasts_s=lambda context: context.long_s, in_force=faults.queue_was_full, note=faults.how_full),
)  # fmt: skip
CRON_REMOVED, CRON_REMOVED_WHAT = "checker-gone", "cron was removed: the server notices its silent checker"
