#!/usr/bin/env python3
"""Checks the service once: prints the report as JSON, writes it to logs/health.json, exits 0 if it serves, else 1.

    * * * * * /path/to/python /path/to/health_check.py

Works from any folder, with an empty environment, and with any Python: one that lacks the packages hands over
to the project's .venv.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"


def main() -> int:
    os.chdir(ROOT)  # settings may hold relative paths, and cron starts elsewhere
    sys.path.insert(0, str(ROOT))
    try:
        import random

        import settings
        from monitor import check, report
    except (ImportError, TypeError) as error:  # TypeError: annotations that an old Python cannot read
        return hand_over(error)
    try:
        found = settings.load()
    except settings.SettingsError as error:
        print(report.to_json(report.unknown(f"the settings cannot be used: {error}")))
        return 1
    result = check.run(found, random.SystemRandom())
    try:
        report.write(result, found.log_dir)
    except OSError as error:
        print(f"{found.log_dir / report.FILE_NAME} could not be written: {error.strerror}", file=sys.stderr)
    print(report.to_json(result))
    return 0 if result["service_healthy"] else 1


def hand_over(error: Exception) -> int:
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(str(python), [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])
    print(f"{sys.executable} cannot run this: {error}. Run ./start.sh once or use its Python.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
