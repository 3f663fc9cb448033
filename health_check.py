#!/usr/bin/env python3
"""Watches the service, says what is wrong with it, and cures what a restart can cure.

    health_check.py                 one run, as cron does it: prints the report as JSON; exit 0 if it serves, else 1
    health_check.py install         runs itself every minute from now on (systemd timer or cron)
    health_check.py --help          everything else

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
        from monitor import check, cli  # noqa: F401  `check` brings in every package that a run needs
    except (ImportError, TypeError, SyntaxError) as error:  # annotations and syntax that an old Python cannot read
        return hand_over(error)
    return cli.main(sys.argv[1:])


def hand_over(error: Exception) -> int:
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(str(python), [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])
    print(f"{sys.executable} cannot run this: {error}. Run ./start.sh once or use its Python.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
