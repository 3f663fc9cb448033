"""Log lines about the checker itself, on standard error, which cron appends to logs/health_check.log."""

from __future__ import annotations

import sys
from datetime import datetime


def warn(text: str) -> None:
    print(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}", file=sys.stderr, flush=True)
