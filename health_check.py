#!/usr/bin/env python3
"""Checks the service, reports what is wrong, and restarts what a restart can cure.

    health_check.py                 one run, as cron does it: prints the report as JSON; exit 0 if healthy, else 1
    health_check.py install         schedules a run every minute (systemd timer or cron)
    health_check.py --help          everything else

Works from any folder, with an empty environment, and with any Python 3: one without the packages re-executes this file
with the Python of the project's .venv.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"


def main() -> int:
    os.chdir(ROOT)  # settings may be relative paths, and cron starts in another folder
    sys.path.insert(0, str(ROOT))
    try:
        from monitor import check, cli  # noqa: F401  `check` imports every package that a run needs
    except (ImportError, TypeError, SyntaxError) as error:  # an old Python fails on newer annotations and syntax
        return run_with_venv(error)
    return cli.main(sys.argv[1:])


def run_with_venv(error: Exception) -> int:
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(str(python), [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])
    reason = f"{sys.executable} cannot run health_check.py: {error}. Run ./start.sh once, or use its Python."
    print(reason, file=sys.stderr)
    if sys.argv[1:2] in ([], ["run"], ["loop"]):
        publish_unknown(reason)
    return 1


def publish_unknown(reason: str) -> None:
    """Without any package, so that nobody takes an earlier report for today's."""
    try:
        from deploy import plain_settings

        log_dir = plain_settings.unchecked(ROOT).log_dir
    except Exception:  # deploy/ may be what is missing
        log_dir = ROOT / (os.environ.get("GLM_LOG_DIR") or "logs")
    keys = ("gpu_load", "gpu_memory_used", "cpu_percent", "memory_used_percent", "service_healthy")
    report: dict[str, object] = {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), **dict.fromkeys(keys), "schema_version": 2, "verdict": "unknown",
        "reasons": [reason], "evidence": {},
    }  # fmt: skip
    temporary = log_dir / f".health.json.{os.getpid()}"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
        temporary.replace(log_dir / "health.json")
    except OSError as error:
        print(f"{log_dir / 'health.json'} could not be written: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
