"""The faults of the drill, and the verdicts and restarts that each must cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from monitor.drill.context import FaultContext
from monitor.drill.faults import clocks, files, load, ports, processes, readings
from monitor.drill.faults.processes import Inject, injected, injected_at_restart, injected_while_loading, no_fault
from monitor.store import baseline
from monitor.store.store import Store
from settings import Settings

SLOW_S = 5.0
CHECKER_LIMIT_BYTES = 100e6  # bounded, whatever a server sends; a healthy run stays below 60 MB
FINGERPRINT_EVERY_S = 600.0
BEFORE_S = 3.0  # between two runs that come before a fault, which need not keep the pace
Report = dict[str, Any]
Proof = Callable[[Report, Store], bool]
Why = Callable[[FaultContext], str]


def nothing(context: FaultContext) -> str:
    return ""


@dataclass(frozen=True)
class Fault:
    """`verdicts`: those that count as detection for `target`. `restarts`: the numbers that are right. `cured`: the target must
    recover while the fault is injected.

    `around` is in force from `runs_before` runs before the injection (users, an external engine) and from as many more as it
    takes until `why_not_ready` is empty. `visible_s`: how long the fault is invisible by definition, such as the deadline of a step.
    `found_within`: runs from then until it must be detected. `in_order`: verdicts that must be seen one after the other.
    `lasts_s`: minimum duration of a fault that must not be cured. `proof`: what one report must show as well. `never`: why a
    report is a lie, or empty. `why_not_in_force`: checked after each run; empty if the fault was effective since the run
    before. `why_not_here`: why this machine cannot have the fault. `note`: printed with the result. `runs`: the most, besides
    those while it is invisible or lasts.
    """

    name: str
    description: str
    inject: Inject
    verdicts: tuple[str, ...]
    target: str = "api"
    restarts: tuple[int, ...] = (1,)
    cured: bool = True
    around: Inject = no_fault
    runs_before: int = 0
    why_not_ready: Why = nothing
    in_order: tuple[str, ...] = ()
    found_within: int = 2
    visible_s: Callable[[Settings], float] = lambda settings: 0.0
    lasts_s: Callable[[FaultContext], float] = lambda context: 0.0
    proof: Proof = lambda report, store: True
    never: Callable[[Report, FaultContext], str] = lambda report, context: ""
    why_not_in_force: Why = nothing
    why_not_here: Why = nothing
    note: Why = nothing
    runs: int = 15

    def expected_s(self, settings: Settings, context: FaultContext, period_s: float) -> float:
        """How long it takes if all goes well, with the start of a healthy service before it."""
        until_found = 1 if self.found_within <= 2 else self.found_within // 2
        runs = until_found + max(self.restarts) - 0.5 + (0 if self.cured else RUNS_AFTER)
        return 45 + self.runs_before * (BEFORE_S + 1) + self.visible_s(settings) + self.lasts_s(context) + runs * period_s


RUNS_AFTER = 2  # in which nothing more may happen


def gpu_evidence_has(text: str) -> Proof:
    return lambda report, store: text.lower() in json.dumps(report["evidence"]["gpu"]).lower()


def warning_raised(name: str) -> Proof:
    return lambda report, store: any(warning["name"] == name for warning in report["warnings"])


def rule_is(*rules: str, target: str = "api") -> Proof:
    return lambda report, store: report["targets"][target]["rule"] in rules


def told(text: str) -> Proof:
    """What an operator reads: the reasons, the warnings, the state of the checker, or an alert that waits or was sent."""

    def proof(report: Report, store: Store) -> bool:
        shown = json.dumps([report["reasons"], report["warnings"], report["check"]], ensure_ascii=False)
        alerts = [json.dumps(row, ensure_ascii=False) for row in store.rows("SELECT message FROM outbox")]
        return any(text in line for line in (shown, *alerts))

    return proof


def climbed(*rungs: str) -> Proof:
    """One of these rungs of the ladder was taken for this fault."""

    def proof(report: Report, store: Store) -> bool:
        taken = report["targets"]["api"]["rungs"]
        return any(step["rung"] in rungs and step["outcome"] == "done" for step in taken)

    return proof


def undelivered(report: Report, store: Store) -> bool:
    return bool(store.rows("SELECT id FROM outbox WHERE channel = 'webhook' AND sent_at IS NULL AND error IS NOT NULL"))


def circuit_open(report: Report, store: Store) -> bool:
    return bool(report["targets"]["api"]["circuit_open"])


def store_in_memory(report: Report, store: Store) -> bool:
    return "memory" in report["check"]["store"]


def answered_slowly(report: Report, store: Store) -> bool:
    return any(answer["seconds"] >= SLOW_S for answer in report["evidence"]["api"]["answers"])


def really_asked(report: Report, store: Store) -> bool:
    """An answer is not judged before there is a baseline, which is not taken while users are served."""
    return any(answer["outcome"] in ("right", "unjudged") for answer in report["evidence"]["api"]["answers"])


def found_again(report: Report, store: Store) -> bool:
    return bool(report["evidence"]["api"]["process"]["state"] == "runs")


def credited(report: Report, context: FaultContext) -> str:
    kinds = [answer["kind"] for answer in report["evidence"]["api"]["answers"] if answer["outcome"] == "credited"]
    return f"it took its own question for a user's ({', '.join(kinds)})" if kinds else ""


def called_healthy(report: Report, context: FaultContext) -> str:
    return "it was called healthy" if report["targets"]["api"]["word"] == "healthy" else ""


def healthy_while_users_fail(report: Report, context: FaultContext) -> str:
    """Of the process under the cap; its successor starts with failures that were its predecessor's."""
    assert context.traffic is not None
    failed, context.failed_before = sum(context.traffic.failed.values()) - context.failed_before, sum(context.traffic.failed.values())
    same = report["evidence"]["api"]["process"]["pid"] == context.capped_pid
    return f"it was called healthy while {failed} requests of users failed" if same and failed > 3 and called_healthy(report, context) else ""


def second_server(report: Report, context: FaultContext) -> str:
    found = files.servers_here("api.server")
    return f"{len(found)} API servers run in this folder" if len(found) > 1 else ""


def history_deleted(report: Report, context: FaultContext) -> str:
    left = clocks.count_runs(context, context.injected_at)
    return f"{context.rows_before - left} runs of the history are gone" if left < context.rows_before else ""


def memory_unbounded(report: Report, context: FaultContext) -> str:
    peak = context.checker_peak_bytes
    return f"a run of the checker held {peak / 1e6:.0f} MB" if peak > CHECKER_LIMIT_BYTES else ""


def memory_summary(context: FaultContext) -> str:
    return f"a run of the checker held {context.checker_peak_bytes / 1e6:.0f} MB at most"


def why_no_baseline(context: FaultContext) -> str:
    """The file is there from the first answers on, but nothing is judged by it before it is taken."""
    color = baseline.read(context.log_dir).get("kinds", {}).get("color", {})
    return "" if color.get("sure") else "the checker has taken no sure baseline of colors yet"


def means(context: FaultContext) -> str:
    return context.means


def short(limit_s: float) -> Callable[[FaultContext], float]:
    """`limit_s`, or less in a quick drill."""
    return lambda context: min(limit_s, context.long_s)


def twice_the_loading_limit(context: FaultContext) -> float:
    return 2 * context.settings.start_deadline_s


UNAFFECTED = ("healthy", "busy")
TOLD = ("degraded", "broken", "corrupt")
NEVER: tuple[int, ...] = (0,)
watched = partial(Fault, restarts=NEVER, cured=False, around=ports.engine_behind, runs_before=1)
FAULTS = (
    Fault("api-killed", "SIGKILL to the API", processes.kill, ("dead",)),
    Fault("page-killed", "SIGKILL to the page", partial(processes.kill, part="web"), ("dead",), "page"),
    Fault("api-frozen", "SIGSTOP to the API", processes.freeze, ("zombie",)),
    Fault("heartbeat-from-future", "SIGSTOP to the API, and its heartbeat lies in the future", clocks.beat_in_the_future, ("zombie",)),
    Fault("loop-blocked", "the event loop is blocked", injected("block-loop", seconds=lambda context: 1800.0), ("zombie",)),
    Fault("step-hung", "a step of the engine never ends", injected("hang-step", with_request=True), ("wedged",),
          visible_s=lambda s: s.stall_s),
    Fault("engine-dead", "the engine's thread loses its device", injected("kill-engine", with_request=True), ("dead",)),
    Fault("pictures-broken", "pictures fail while text works", injected("blind"), ("broken",)),
    Fault("page-script-broken", "the page's script raises", files.break_script, ("broken",), "page", cured=False),
    Fault("port-stolen", "the API is gone and another process has its port", ports.steal, ("dead",), restarts=NEVER, cured=False),
    Fault("stranger-replays", "the API is gone and a stranger answers a copied /health with fresh successes", ports.replay, ("dead",),
          restarts=NEVER, cured=False, found_within=1, proof=rule_is("port_taken"), never=called_healthy),
    Fault("users-fail", "too little memory for users' pictures, while small questions work", processes.cap_memory, ("degraded", "broken"),
          around=load.users(4, ("picture", "text", "picture", "text")), never=healthy_while_users_fail,
          note=lambda context: f"{context.means}; {load.summary(context)}"),
    Fault("wrong-probe-token", "the checker has a wrong probe token: must NOT restart", readings.configured(GLM_PROBE_TOKEN="not-the-one"),
          (*UNAFFECTED, "degraded"), restarts=NEVER, cured=False, never=credited),
    Fault("new-page-token", "the checker has another page token: must NOT restart", readings.configured(GLM_WEB_TOKEN="not-the-one"),
          (*UNAFFECTED, "degraded", "broken"), "page", restarts=NEVER, cured=False),
    Fault("nonfinite", "two requests meet logits that are not finite", processes.injected_twice("nan-layer"), ("corrupt",),
          restarts=(0, 1), proof=climbed("drop-caches", "reload-weights", "restart")),
    # Which bit it is decides whether the fingerprint, numbers that are not finite or wrong answers show it first.
    Fault("weights-flipped", "a bit of the weights is flipped", injected("flip-weight"), ("corrupt", "broken"), restarts=NEVER,
          visible_s=lambda settings: FINGERPRINT_EVERY_S, found_within=3, proof=climbed("reload-weights")),
    Fault("colors-swapped", "red and green are exchanged in the weights", injected("swap-colors"), TOLD, restarts=(0, 1),
          runs_before=5, why_not_ready=why_no_baseline, found_within=60, runs=60, proof=climbed("reload-weights", "restart")),
    Fault("slowed", "2 % of the processor: must NOT restart", processes.slow_down, ("degraded",), restarts=NEVER, cured=False,
          around=load.users(2, ("text", "picture"), pause_s=1.0), runs_before=30, found_within=10, runs=15, proof=rule_is("slower_than_before"),
          note=means),
    Fault("store-damaged", "pages of the checker's store are overwritten, and the API is killed", files.damage_store, ("dead",),
          proof=told("state.db")),
    Fault("chats-damaged", "pages of the page's chats are overwritten: must NOT restart", files.damage_chats, UNAFFECTED, "page",
          restarts=NEVER, cured=False),
    Fault("env-typo", "a typo in .env, and the API is killed", files.misspell_a_setting, ("dead",), proof=told("GLM_API_PROT")),
    Fault("pid-file-damaged", "the API's pid file is cut in half: must NOT restart", files.damage_pid_file, (*UNAFFECTED, "degraded"),
          restarts=NEVER, cured=False, proof=found_again, never=second_server),
    Fault("logs-deleted", "the folder of the logs is deleted: must NOT restart", files.delete_logs, (*UNAFFECTED, "degraded"), restarts=NEVER,
          cured=False, proof=found_again, never=second_server),
    Fault("disk-full", "no byte free for the logs and the store", files.fill_disk, UNAFFECTED, restarts=NEVER, cured=False,
          proof=store_in_memory, why_not_here=files.why_no_mount),
    Fault("disk-read-only", "the logs' file system is read-only", files.write_protect, UNAFFECTED, restarts=NEVER, cured=False,
          proof=store_in_memory, why_not_here=files.why_no_mount),
    Fault("gpu-tool-hung", "nvidia-smi never answers", readings.fake_nvidia_smi("exec sleep 600"), UNAFFECTED, restarts=NEVER, cured=False,
          proof=gpu_evidence_has("did not answer")),
    Fault("gpu-tool-garbage", "nvidia-smi prints nonsense", readings.fake_nvidia_smi("echo 'Failed to initialize NVML: Unknown Error'"),
          UNAFFECTED, restarts=NEVER, cured=False, proof=gpu_evidence_has("gputil")),
    Fault("gpu-tool-gone", "no nvidia-smi and no NVML", no_fault, UNAFFECTED, restarts=NEVER, cured=False, proof=gpu_evidence_has("nvml")),
    Fault("slow-start", "killed, and its successor loads slowly", injected_at_restart("slow-start", short(40.0)), ("dead",)),
    Fault("loading-slow-but-moving", "loads for longer than loading may stand still, but always moves: must NOT restart",
          injected_while_loading("slow-start", twice_the_loading_limit), ("starting",), restarts=NEVER, cured=False,
          lasts_s=twice_the_loading_limit, found_within=1),
    Fault("loading-still", "its loading stands still", injected_while_loading("slow-loading-still", twice_the_loading_limit), ("broken",),
          visible_s=lambda settings: settings.start_deadline_s, in_order=("starting", "broken"), found_within=3),
    Fault("crash-loop", "killed, and every successor exits at once", injected_at_restart("crash-start"), ("dead",), restarts=(3,), cured=False,
          proof=circuit_open, found_within=6, runs=40),
    Fault("clock-jump", "killed as the clock jumps by an hour: judged a run later", clocks.jump_an_hour, ("dead",), proof=rule_is("clock_jump")),
    Fault("clock-jumps-a-day", "the clock jumps by a day: must NOT restart or forget", clocks.jump_a_day, (*UNAFFECTED, "unknown"),
          restarts=NEVER, cured=False, never=history_deleted),
    Fault("long-prefill", "one step takes 60 s: must NOT restart", injected("slow-step", seconds=short(60.0), with_request=True),
          UNAFFECTED, restarts=NEVER, cured=False, lasts_s=lambda context: min(75.0, context.long_s + 15), proof=answered_slowly),
    Fault("gpu-at-100", "every card at 100 % load: must NOT restart", readings.full_gpu_load, UNAFFECTED, restarts=NEVER, cured=False,
          proof=gpu_evidence_has('"load_percent": 100')),
    Fault("memory-at-limit", "memory at its limit: must NOT restart", readings.exceed_memory_limit, UNAFFECTED, restarts=NEVER, cured=False,
          proof=warning_raised("memory_used_percent")),
    Fault("alert-channel-down", "the alert channel accepts nothing: must NOT restart", ports.block_alert_channel, UNAFFECTED, restarts=NEVER,
          cured=False, proof=undelivered),
    Fault("saturated", "the queue full for ten minutes: must NOT restart", load.saturate, UNAFFECTED, restarts=NEVER, cured=False,
          lasts_s=lambda context: context.long_s, why_not_in_force=load.why_queue_not_full, note=load.queue_full_summary),
    Fault("healthy-under-legal-load", "24 users with large pictures, schemas and aborts: must NOT restart", load.under_way, UNAFFECTED,
          restarts=NEVER, cured=False, around=load.users(24), lasts_s=short(300.0),
          # Users' answers stand in for questions for three minutes.
          proof=really_asked, found_within=5, note=load.summary),
    watched("engine-hangs", "an external engine says 200 and hangs: never restarted", ports.engine_becomes("hangs"), ("wedged",),
          visible_s=lambda s: s.stall_s),
    watched("engine-wrong", "an external engine answers wrongly: never restarted", ports.engine_becomes("wrong"), TOLD, runs_before=5,
            why_not_ready=why_no_baseline, found_within=8),
    watched("engine-slow", "an external engine gets slow: never restarted", ports.engine_becomes("slow"), ("degraded",), runs_before=30,
            why_not_ready=why_no_baseline, found_within=10, proof=rule_is("slower_than_before")),
    watched("engine-fails", "an external engine answers each question with 500: never restarted", ports.engine_becomes("failing"), TOLD),
    watched("endless-line", "an external engine answers with a line that never ends: never restarted", ports.engine_becomes("endless"), TOLD,
          never=memory_unbounded, note=memory_summary),
)  # fmt: skip
CRON_REMOVED, CRON_REMOVED_DESCRIPTION = "checker-gone", "cron was removed: the server notices its silent checker"

# What the drill cannot make, and where it is tested instead.
NOT_HERE = {
    "xid": "XID and ECC errors come from a card's driver: tests/api/health",
    "reference-differs": "a difference from the reference at the first load takes a wrong program: tests/api/engine",
    "older-version-runs": "it is start.sh that says so to an operator: tests/scripts/test_start.py",
    "interrupted-start": "Ctrl-C hits start.sh, not a running service: tests/scripts/test_start.py",
    "stop-with-broken-settings": "it is stop.sh that is broken: tests/scripts/test_stop.py",
    "other-user": "it takes a second account on the machine: tests/scripts",
    "lost-pcie-width": "it takes a card: tests/monitor/judge",
}
