"""What a fault may use and what it leaves for the judgement of its result. Affects only what start.sh started in this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from monitor.drill.traffic import Traffic
from monitor.observe import processes
from settings import Settings

if TYPE_CHECKING:
    from monitor.drill.faults.ports import StandIn

FAULT_FILE = "api.fault"


@dataclass
class FaultContext:
    """`long_s`: duration of the long faults. `env` is added to the checker's environment. `traffic`: users of this fault. `engine`: the
    external engine that is watched in place of the API.

    `queue_full_at`: times (CLOCK_MONOTONIC) of rejections for a full queue; `checked_until`: the last call of
    `why_queue_not_full`; `injected_at` (Unix seconds); `rows_before`: runs in the store before that; `checker_peak_bytes`: the most memory that a run
    of the checker has held; `capped_pid`: the process whose memory is capped; `failed_before`: requests of users that had
    failed at the run before; `means`: how the fault was made, where there are several ways.
    """

    settings: Settings
    long_s: float = 600.0
    env: dict[str, str] = field(default_factory=dict)
    traffic: Traffic | None = None
    engine: StandIn | None = None
    queue_full_at: list[float] = field(default_factory=list)
    checked_until: float = 0.0
    injected_at: float = 0.0
    rows_before: int = 0
    capped_pid: int = 0
    failed_before: int = 0
    checker_peak_bytes: int = 0
    means: str = ""

    @property
    def log_dir(self) -> Path:
        """The checker's, which a fault may have moved."""
        return Path(self.env.get("GLM_LOG_DIR", self.settings.log_dir))

    @property
    def key(self) -> str:
        return self.settings.api_key.get_secret_value() if self.settings.api_key else ""

    def pid(self, part: str) -> int:
        record = processes.read_record(self.settings.log_dir, part)
        if record is None or not processes.is_running(record):
            raise RuntimeError(f"{part} is not running; start it with ./start.sh before the drill")
        return record.pid

    def inject(self, fault: str, seconds: float = 0, bound: bool = True) -> None:
        """Makes the API inject a fault into itself. With `bound`, only into this process, not into its successor."""
        request = {"fault": fault, "seconds": seconds, **({"pid": self.pid("api")} if bound else {})}
        path = self.settings.log_dir / FAULT_FILE
        path.with_suffix(".tmp").write_text(json.dumps(request), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)

    def clear_fault(self) -> None:
        (self.settings.log_dir / FAULT_FILE).unlink(missing_ok=True)
