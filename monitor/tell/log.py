"""Problems of the checker itself, for logs/health_check.log: with the time, because cron adds none."""

from __future__ import annotations

import sys
from datetime import datetime


def warn(text: str) -> None:
    print(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}", file=sys.stderr, flush=True)
