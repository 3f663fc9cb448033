"""Tells the nginx in front of the replicas which of them get requests: a configuration anew, and a reload, which ends no answer."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection

from monitor.observe import processes
from monitor.observe.process_search import FRONT_CONF
from monitor.tell import report
from monitor.tell.log import warn
from settings import Settings


def take_out(settings: Settings, out: Collection[int]) -> bool:
    """Whether that was a change. `out`: the numbers of the replicas that get none. Does nothing while nginx does not run."""
    record = processes.read_record(settings.log_dir, "front")
    if record is None or not processes.is_running(record):
        return False
    path = settings.log_dir / FRONT_CONF
    try:
        before = path.read_text(encoding="utf-8")
        # Only this: other settings take effect with ./start.sh --restart.
        wanted = _marked(before, settings, out)
        if wanted == before:
            return False
        report.replace_file(path, wanted)
    except OSError as error:
        warn(f"nginx still sends requests to replicas that do not serve: {error}")
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(record.pid, signal.SIGHUP)
    return True


def _marked(text: str, settings: Settings, out: Collection[int]) -> str:
    plain = text.replace(" down;", ";")
    for number in out:
        line = f"server 127.0.0.1:{settings.replica_port(number)} max_fails=0"
        plain = plain.replace(f"{line};", f"{line} down;")
    return plain
