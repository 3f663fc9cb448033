#!/usr/bin/env python3
"""Checks the service, reports what is wrong, and restarts what a restart can cure.

    health_check.py                 one run, as cron does it: prints the report as JSON; exit 0 if healthy, else 1
    health_check.py install         schedules a run every minute (systemd timer or cron)
    health_check.py --help          everything else

Works from any folder, with an empty environment, and with any Python 3: one without the packages re-executes this file
with the Python of the project's .venv.
"""

from __future__ import annotations

import os
import sys
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
    print(f"{sys.executable} cannot run health_check.py: {error}. Run ./start.sh once, or use its Python.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
