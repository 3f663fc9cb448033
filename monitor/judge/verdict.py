"""The verdict, and the rules that the API and the page share.

Rules are tried in order of trust; the first match decides. A verdict has its rule, the numbers, the threshold, a sentence
in English and Chinese, and whether a restart could cure it. Busy is not dead: while pending work makes steps, or is within
the deadline of its phase, no HTTP answer counts against the service.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from monitor.judge.evidence import ApiEvidence, FrontEvidence, PageEvidence, Process

WORDS = ("healthy", "busy", "starting", "degraded", "broken", "corrupt", "wedged", "zombie", "hardware", "dead", "unknown")
SERVING = ("healthy", "busy", "degraded")
NO_INCIDENT = (*SERVING, "starting", "unknown")  # verdicts that open no incident
FRESH_PROCESS_S = 60.0  # imports alone take that long on a slow machine


@dataclass(frozen=True)
class Limits:
    """The thresholds of the rules, in seconds and runs. `start_s`: loading may stand still for so long. `budget_s`: of a run. `stop_s`: after
    a stop signal the API may go on for so long.

    Users' requests fail too often if more than `failure_share` of them do, and at least `failure_count`.
    """

    period_s: float = 60.0
    beat_s: float = 60.0
    stall_s: float = 120.0
    start_s: float = 300.0
    confirm_runs: int = 2
    stable_s: float = 600.0
    failure_share: float = 0.05
    failure_count: int = 3
    budget_s: float = 45.0
    stop_s: float = 10.0


@dataclass(frozen=True)
class Verdict:
    """`cure`: a restart of this target can help. `needed`: consecutive runs that confirm it.

    `attempts`: most restarts in one incident; None leaves it to the limiter. `part`: which process a restart would be of, if not
    the target's own.
    """

    target: str
    word: str
    rule: str
    en: str
    zh: str
    facts: dict[str, Any] = field(default_factory=dict)
    threshold: str = ""
    cure: bool = False
    needed: int = 1
    attempts: int | None = None
    part: str = ""

    @property
    def serving(self) -> bool:
        return self.word in SERVING

    @property
    def bad(self) -> bool:
        return self.word not in NO_INCIDENT


def checker_blind(evidence: ApiEvidence | PageEvidence | FrontEvidence, limits: Limits) -> Verdict | None:
    if not evidence.blind:
        return None
    target = "api" if isinstance(evidence, ApiEvidence) else "front" if isinstance(evidence, FrontEvidence) else "page"
    return Verdict(
        target, "unknown", "checker_blind", f"The checker cannot judge: {evidence.blind}.", f"检查程序无法判断：{evidence.blind}。",
        threshold="the checker's own test must pass",
    )  # fmt: skip


def port_taken(target: str, name: str, process: Process) -> Verdict:
    return Verdict(
        target, "dead", "port_taken", f"The port of the {name} is held by {process.holder or 'another process'}. End it, "
        "then run ./start.sh.", f"{name} 的端口被 {process.holder or '其他进程'} 占用。请结束它，再运行 ./start.sh。",
        {"holder": process.holder}, "the port's owner must be the process that start.sh started",
    )  # fmt: skip


def process_gone(target: str, name: str, process: Process) -> Verdict:
    oom_en = " The kernel killed it for memory." if process.oom_killed else ""
    oom_zh = "它因内存不足被内核终止。" if process.oom_killed else ""
    return Verdict(
        target, "dead", "process_gone", f"The {name} process (pid {process.pid}) is gone.{oom_en}",
        f"{name} 进程（pid {process.pid}）已不存在。{oom_zh}", {"pid": process.pid, "oom_killed": process.oom_killed},
        "the recorded process must run", cure=True,
    )  # fmt: skip


def restarting(target: str, name: str, process: Process) -> Verdict:
    return Verdict(
        target, "starting", "restarting", f"The {name} is being restarted by a person (./start.sh --restart).",
        f"有人正在重启 {name}（./start.sh --restart）。", {"pid": process.pid}, "for as long as that start.sh takes, within its time limit",
    )  # fmt: skip


def frozen_by_group(target: str, name: str, process: Process, limits: Limits) -> Verdict:
    """As by `docker pause`. Not even SIGKILL reaches it there under cgroup v1, and somebody did it on purpose."""
    return Verdict(
        target, "zombie", "frozen_by_group", f"The {name} process (pid {process.pid}) is frozen by its control group ({process.frozen_by}). Thaw it: "
        "resume its container (docker unpause), or write to the group's own file what ends it. A restart cannot.",
        f"{name} 进程（pid {process.pid}）被其控制组冻结（{process.frozen_by}）。请恢复容器（docker unpause）或解冻该控制组；重启无济于事。",
        {"pid": process.pid, "frozen_by": process.frozen_by}, f"its group must not be frozen, on {limits.confirm_runs} runs in a row",
        needed=limits.confirm_runs,
    )  # fmt: skip
